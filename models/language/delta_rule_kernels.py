"""Triton kernels for the chunked gated delta rule on a GPU: what has to go from chunk to chunk one after another.

    R_n = U_n − W_n S_n                          what the chunk writes in the place of its values
    S_{n+1} = exp(d_end) S_n + K_endᵀ R_n        K_end = K ∘ exp(d_end − d)

U and W solve the chunk's triangular system (delta_rule.py), for all chunks at once, and what tokens read of S_n and R_n
is what they read in linear attention (linear_attention_kernels.read). The backward pass of the scan goes from the last
chunk to the first with ∂S, and leaves to plain products what it need not do in order:

    ∂R_n = ∂R_n + K_end ∂S_{n+1}                 ∂K_end = R_n ∂S_{n+1}ᵀ        ∂U = ∂R        ∂W = −∂R S_nᵀ
    ∂S_n = ∂S_n + exp(d_end) ∂S_{n+1} − W_nᵀ ∂R_n

Shapes: W, K_end [B, H, N, chunk, F], U, R [B, H, N, chunk, C] and the states before each chunk [B, H, N, F, C] in the
dtype of v, though the scan sums in float32; log_kept = d_end [B, H, N] float32.
"""

# mypy: disallow-untyped-defs=False
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.language import linear_attention_kernels, linear_attention_scan
from models.language.delta_rule import triangular_systems
from models.language.linear_attention import decay_between


@triton.jit
def _rows(base, chunk, offset, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr):
    """Pointers to channels offset to offset + WIDTH of one chunk's [BT, STRIDE]."""
    return base + chunk * BT * STRIDE + tl.arange(0, BT)[:, None] * STRIDE + offset + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _state(base, chunk, offset, F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """Pointers to columns offset to offset + BC of one chunk's [F, C]."""
    return base + chunk * F * C + tl.arange(0, F)[:, None] * C + offset + tl.arange(0, BC)[None, :]


@triton.jit
def _scan_forward(
    w, u, k_end, log_kept, state, before, written, last, N,
    F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    bh, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC
    s = tl.load(_state(state, bh, offset, F, C, BC))
    for n in range(N):
        chunk = bh * N + n
        tl.store(_state(before, chunk, offset, F, C, BC), s)
        w_tile = tl.load(_rows(w, chunk, 0, F, F, BT))
        k_tile = tl.load(_rows(k_end, chunk, 0, F, F, BT))
        r = tl.load(_rows(u, chunk, offset, C, BC, BT)).to(tl.float32)
        r = (r - tl.dot(w_tile, s.to(w_tile.dtype), input_precision="ieee")).to(w_tile.dtype)
        tl.store(_rows(written, chunk, offset, C, BC, BT), r)
        s = tl.exp(tl.load(log_kept + chunk)) * s + tl.dot(tl.trans(k_tile), r, input_precision="ieee")
    tl.store(_state(last, bh, offset, F, C, BC), s)


@triton.jit
def _scan_backward(
    w, k_end, log_kept, before, d_before, d_written, d_last, d_after, d_u, d_kept, d_state, N,
    F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = block * BC
    ds = tl.load(_state(d_last, bh, offset, F, C, BC))
    for m in range(N):
        chunk = bh * N + N - 1 - m
        tl.store(_state(d_after, chunk, offset, F, C, BC), ds)
        w_tile = tl.load(_rows(w, chunk, 0, F, F, BT))
        k_tile = tl.load(_rows(k_end, chunk, 0, F, F, BT))
        dr = tl.load(_rows(d_written, chunk, offset, C, BC, BT)).to(tl.float32)
        dr = (dr + tl.dot(k_tile, ds.to(k_tile.dtype), input_precision="ieee")).to(w_tile.dtype)
        tl.store(_rows(d_u, chunk, offset, C, BC, BT), dr)
        kept = tl.exp(tl.load(log_kept + chunk))
        s = tl.load(_state(before, chunk, offset, F, C, BC))
        tl.store(d_kept + chunk * tl.num_programs(1) + block, kept * tl.sum(tl.sum(ds * s, 1), 0))
        ds = kept * ds + tl.load(_state(d_before, chunk, offset, F, C, BC))
        ds -= tl.dot(tl.trans(w_tile), dr, input_precision="ieee")
    tl.store(_state(d_state, bh, offset, F, C, BC), ds)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, u: Tensor, k_end: Tensor, log_kept: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, chunks = w.shape[:3]
        before = torch.empty(batch, heads, chunks, *state.shape[2:], dtype=u.dtype, device=u.device)
        written, last = torch.empty_like(u), torch.empty_like(state)
        sizes = _sizes(w, u)
        grid = (batch * heads, u.shape[-1] // sizes["BC"])
        _scan_forward[grid](w, u, k_end, log_kept, state, before, written, last, chunks, **sizes)
        ctx.save_for_backward(w, k_end, log_kept, before, written)
        return before, written, last

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_written: Tensor, d_last: Tensor) -> tuple[Tensor, ...]:
        w, k_end, log_kept, before, written = ctx.saved_tensors
        batch, heads, chunks = log_kept.shape
        sizes = _sizes(w, written)
        blocks = written.shape[-1] // sizes["BC"]
        d_after, d_u = torch.empty_like(before), torch.empty_like(written)
        d_kept = torch.empty(*log_kept.shape, blocks, device=w.device)
        d_state = torch.empty_like(d_last, memory_format=torch.contiguous_format)
        arguments = (w, k_end, log_kept, before, d_before.contiguous(), d_written.contiguous(), d_last.contiguous())
        _scan_backward[(batch * heads, blocks)](*arguments, d_after, d_u, d_kept, d_state, chunks, **sizes)
        return -(d_u @ before.mT), d_u, written @ d_after.mT, d_kept.sum(-1), d_state


def _sizes(w: Tensor, u: Tensor) -> dict[str, int]:
    """Channels of v at once, and warps. The chunks follow one another, so there should be many programs side by
    side."""
    channels = u.shape[-1]
    return {
        "F": w.shape[-1],
        "C": channels,
        "BC": min(channels, 32),
        "BT": w.shape[-2],
        "num_warps": 4,
        "num_stages": 2,
    }


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """As delta_rule.chunked; q and k are brought to the dtype of v."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    decay = linear_attention_scan.chunk_decay(log_g, chunk)
    systems = triangular_systems(k, v, decay, decay_between(decay), beta)
    w, u, k_end = (x.to(v.dtype).contiguous() for x in systems)
    if state is None:
        state = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], device=k.device)
    before, written, last = _Scan.apply(w, u, k_end, decay[..., -1].contiguous(), state.float().contiguous())
    values = written.flatten(2, 3)[:, :, : q.shape[1]].transpose(1, 2)
    return linear_attention_kernels.read(q, k, values, decay, before, chunk), last
