"""Softmax attention over runs of consecutive keys, through FlexAttention (Dong et al. 2024, arXiv 2412.05496).

The block mask is written down from the runs, so nothing of size [T, T] is made: a block of queries visits the blocks of
keys from its first query's first key to its last query's last.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from models.language.sparse_patterns import Part

BLOCK = 128


def interval_attention(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, parts: Iterable[Part]) -> Tensor:
    """Attention over the union of the parts, which are disjoint, [T, H, C]."""
    outputs, logsums = [], []
    for part in parts:
        q = q_THC if part.queries is None else q_THC[part.queries]
        k, v = (x if part.keys is None else x[part.keys] for x in (k_TKC, v_TKC))
        if len(k) == 0:  # no sequence is long enough to have far keys
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        o, aux = _flex(q.device.type)(
            q, k, v, block_mask=block_mask(part, k.shape[2]), enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
        o, logsum = o[0].transpose(0, 1), aux.lse[0].mT  # [T, H, C], [T, H]
        if part.queries is not None:
            back = part.queries.argsort()
            o, logsum = o[back], logsum[back]
        outputs.append(o)
        logsums.append(logsum)
    if len(outputs) == 1:
        return outputs[0]
    share = torch.stack(logsums).softmax(0).to(q_THC.dtype)  # of the softmax's weight that falls on each part
    return (torch.stack(outputs) * share[..., None]).sum(0)


def block_mask(part: Part, keys: int) -> BlockMask:
    first, end = part.first, part.end
    starts = torch.arange(0, len(first), BLOCK, device=first.device)
    lowest, highest = first[starts] // BLOCK, end[(starts + BLOCK - 1).clamp(max=len(end) - 1)]
    count = (highest + BLOCK - 1) // BLOCK - lowest
    blocks = torch.arange((keys + BLOCK - 1) // BLOCK, device=first.device)
    # The first `count` entries of a row count; the others must be valid numbers all the same.
    indices = (lowest[:, None] + blocks).clamp(max=len(blocks) - 1)

    def inside(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < end[query])

    return BlockMask.from_kv_blocks(
        count[None, None].clamp(min=0).to(torch.int32),
        indices[None, None].to(torch.int32),
        BLOCK_SIZE=BLOCK,
        mask_mod=inside,
        seq_lengths=(len(first), keys),
    )


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    """Compiled where it is a kernel; on the CPU the plain form, which scores every pair, for tests."""
    plain: Callable[..., Any] = flex_attention
    if device_type != "cuda":
        return plain
    compiled = torch.compile(plain, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Lengths, dtypes and gradient modes are compiled apart. Past its limit torch would quietly run the plain form.
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*args, **kwargs)

    return call
