"""Strided and fixed sparse attention over vLLM's paged keys and values.

vLLM's own kernels read every key or a window. This layer keeps its keys and values in vLLM's pages like any other, but
gathers from them only the positions that a token reads: decoding costs O(ℓ + L/ℓ) instead of O(L). Tokens of a prompt
are gathered the same way, a slice at a time. Plain torch, so it runs wherever vLLM does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from models.language.attention import SoftmaxAttention, sparse_attention
from models.language.config import LanguageConfig
from models.language.mixers import MIXERS


@dataclass
class SparseMetadata:
    """vLLM's own buffers, which a captured graph reads again at each replay: nothing is derived here."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    max_seq_len: int


class SparseMetadataBuilder(AttentionMetadataBuilder[SparseMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseMetadata:
        common = common_attn_metadata
        return SparseMetadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.max_seq_len,
        )


class SparseBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("the layer itself computes")

    @staticmethod
    def get_builder_cls() -> type[SparseMetadataBuilder]:
        return SparseMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, block_size, 2, num_kv_heads, head_size


class SparseAttention(nn.Module, AttentionLayerBase):
    def __init__(self, config: LanguageConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.dtype = vllm_config.model_config.dtype
        with torch.device("meta"):
            mixer = MIXERS[config.mixer_kind(layer)](config)
        assert isinstance(mixer, SoftmaxAttention)
        assert mixer.pattern is not None
        self.pattern = mixer.pattern
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SparseBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H * C], [T, K * C] twice → [T, H * C]."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory before there are any pages
            return q
        batch = metadata[self.prefix]
        pages = self.kv_cache[0] if isinstance(self.kv_cache, list) else self.kv_cache
        size = pages.shape[1]
        q_THC, k_TKC, v_TKC = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))

        # Rows that only fill a captured graph's batch have slot -1; they go to page 0, which vLLM leaves unused.
        slots_T = batch.slot_mapping[: len(q)].clamp(min=0)
        pages[slots_T // size, slots_T % size] = torch.stack([k_TKC, v_TKC], 1)

        token_T = torch.arange(len(q), device=q.device)
        ends = batch.query_start_loc[1:]
        request_T = torch.searchsorted(ends, token_T, right=True).clamp(max=len(batch.seq_lens) - 1)
        positions_T = (batch.seq_lens[request_T] - ends[request_T] + token_T).clamp(min=0)

        def fetch(tokens: slice, read_NP: Tensor) -> tuple[Tensor, Tensor]:
            page_NP = batch.block_table[request_T[tokens, None], read_NP // size].long()
            k_NPKC, v_NPKC = pages[page_NP, read_NP % size].unbind(2)
            return k_NPKC, v_NPKC

        return sparse_attention(q_THC, positions_T, self.pattern, batch.max_seq_len, fetch).flatten(-2)
