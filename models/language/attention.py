"""Softmax attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245) and QK-norm (Qwen3).

Every token reads all earlier ones, or those of a sparse pattern (sparse_patterns.py).
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from models.language.cache import KeyValueCache
from models.language.config import LanguageConfig
from models.language.interval_attention import interval_attention
from models.language.norm import RMSNorm
from models.language.packing import Packing
from models.language.query_scale import QueryScale
from models.language.rope import rotate
from models.language.sparse_patterns import Fixed, Pattern, Sliding, Strided

# torch 2.11 groups heads by itself; later releases want to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


READ_ENTRIES = 2**24  # keys and values gathered at once for queries that read a cache by a sparse pattern


class SoftmaxAttention(nn.Module):
    pattern: Pattern | None = None  # None: all earlier tokens

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_heads = config.num_key_value_heads
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias and config.o_proj_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.query_scale = QueryScale(config, reads_all=type(self) is SoftmaxAttention)

    def empty_cache(self, batch: int, max_len: int) -> KeyValueCache:
        weight = self.q_proj.weight
        return KeyValueCache(batch, max_len, self.kv_heads, self.head_dim, weight.dtype, weight.device)

    def forward(
        self, x_TD: Tensor, packing: Packing, cos_sin: tuple[Tensor, Tensor], cache: KeyValueCache | None
    ) -> Tensor:
        q_THC, k_TKC, v_TKC = self.project(x_TD, packing, cos_sin)
        if cache is not None:
            o_THC = cached_attention(q_THC, k_TKC, v_TKC, packing, cache, self.pattern)
        else:
            o_THC = packed_attention(q_THC, k_TKC, v_TKC, packing, self.pattern)
        return self.o_proj(o_THC.flatten(-2))

    def project(self, x_TD: Tensor, packing: Packing, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, C], keys and values [T, K, C]; a token's logits are q · k / √C."""
        q_THC = rotate(self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))), *cos_sin)
        k_TKC = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))), *cos_sin)
        v_TKC = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.query_scale(q_THC, packing.positions_T), k_TKC, v_TKC


class SlidingAttention(SoftmaxAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.pattern = Sliding(config.sliding_window)


class StridedAttention(SoftmaxAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.pattern = Strided(config.sparse_stride)


class FixedAttention(SoftmaxAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.pattern = Fixed(config.sparse_stride, config.sparse_summary)


def packed_attention(
    q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, packing: Packing, pattern: Pattern | None = None
) -> Tensor:
    """Causal attention within each sequence of the pack, [T, H, C]."""
    half = q_THC.dtype in (torch.bfloat16, torch.float16)
    if q_THC.is_cuda and half and (pattern is None or isinstance(pattern, Sliding)):
        seqlens, longest = packing.cu_seqlens, packing.max_len
        window = (-1 if pattern is None else pattern.window - 1, 0)  # -1: every token to the left; none to the right
        o_THC = varlen_attn(q_THC, k_TKC, v_TKC, seqlens, seqlens, longest, longest, window_size=window, **_GROUPED)
        return cast(Tensor, o_THC)
    if q_THC.is_cuda and pattern is not None:
        return interval_attention(q_THC, k_TKC, v_TKC, pattern.parts(packing))
    # Padding lies to the right, so a causal mask already hides it from every real token.
    q, k, v = (packing.pad(x).transpose(1, 2) for x in (q_THC, k_TKC, v_TKC))
    mask_LL = None
    if pattern is not None:
        position_L = torch.arange(packing.max_len, device=q.device)
        mask_LL = pattern.allowed(position_L[:, None], position_L)
    o_BHLC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LL, is_causal=mask_LL is None, enable_gqa=True)
    return packing.unpad(o_BHLC.transpose(1, 2))


def cached_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    packing: Packing,
    cache: KeyValueCache,
    pattern: Pattern | None = None,
) -> Tensor:
    """Write the new keys and values to the cache and attend to what it holds, [T, H, C]."""
    cache.keys[packing.sequence_T, packing.positions_T] = k_TKC
    cache.values[packing.sequence_T, packing.positions_T] = v_TKC
    if not any(packing.starts):
        return packed_attention(q_THC, k_TKC, v_TKC, packing, pattern)
    total = max(start + length for start, length in zip(packing.starts, packing.lengths))
    if pattern is not None:

        def fetch(tokens: slice, read_NP: Tensor) -> tuple[Tensor, Tensor]:
            at = packing.sequence_T[tokens, None], read_NP
            return cache.keys[at], cache.values[at]

        return sparse_attention(q_THC, packing.positions_T, pattern, total, fetch)
    k, v = (x[:, :total].transpose(1, 2) for x in (cache.keys, cache.values))
    reach_BL = packing.pad(packing.positions_T)  # a padding query sees one key: finite, and dropped below
    mask_B1LL = (torch.arange(total, device=reach_BL.device) <= reach_BL[..., None])[:, None]
    o_BHLC = F.scaled_dot_product_attention(
        packing.pad(q_THC).transpose(1, 2), k, v, attn_mask=mask_B1LL, enable_gqa=True
    )
    return packing.unpad(o_BHLC.transpose(1, 2))


def sparse_attention(
    q_THC: Tensor,
    positions_T: Tensor,
    pattern: Pattern,
    longest: int,
    fetch: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of single queries to the few positions that each reads, [T, H, C].

    `fetch` returns the keys and values that the tokens of a slice have at these positions, [N, P] → [N, P, K, C].
    `longest` bounds the lengths of the sequences.
    """
    outputs = []
    read_entries = pattern.reads(positions_T[:1], longest)[0].shape[1] * q_THC.shape[1] * q_THC.shape[2]
    size = max(1, READ_ENTRIES // read_entries)
    for begin in range(0, len(q_THC), size):
        tokens = slice(begin, begin + size)
        read_NP, exists_NP = pattern.reads(positions_T[tokens], longest)  # at least its own position
        k_NPKC, v_NPKC = fetch(tokens, read_NP)
        o_NH1C = F.scaled_dot_product_attention(
            q_THC[tokens, :, None],
            k_NPKC.transpose(1, 2),
            v_NPKC.transpose(1, 2),
            attn_mask=exists_NP[:, None, None],
            enable_gqa=True,
        )
        outputs.append(o_NH1C.squeeze(2))
    return torch.cat(outputs)
