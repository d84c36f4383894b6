"""Gated decay linear attention inside vLLM, which keeps each request's state in a slot of fixed size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from models.language.config import LanguageConfig
from models.language.linear_attention import Decay, chunked, features, gated_norm, step
from models.language.norm import RMSNorm
from models.language.packing import Packing


class LinearAttentionLayer(nn.Module, MambaBase):
    """The same functions as the learner's LinearAttention, over vLLM's batch of decoding and prefilling requests."""

    def __init__(self, config: LanguageConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        size = self.heads * self.head_dim
        self.qkvg_proj = MergedColumnParallelLinear(
            config.hidden_size, [size] * 4, bias=False, prefix=f"{prefix}.qkvg_proj"
        )
        self.decay = Decay(config.hidden_size, self.heads)
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = RowParallelLinear(size, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj")
        # vLLM finds the layers that keep state here, and puts their slots in kv_cache.
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache = (torch.tensor([]),)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shape(self.heads, self.head_dim)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory before there are any slots
            return x_TD
        batch = metadata[self.prefix]
        tokens = batch.num_decode_tokens + batch.num_prefill_tokens
        qkvg, _ = self.qkvg_proj(x_TD[:tokens])
        q, k, v, gate = qkvg.chunk(4, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        o_THC = self._mix(features(q), features(k), v, self.decay(x_TD[:tokens]), batch)
        y_TD, _ = self.o_proj(gated_norm(o_THC.to(x_TD.dtype), self.o_norm, gate))
        return F.pad(y_TD, (0, 0, 0, x_TD.shape[0] - tokens))  # rows that only fill a captured graph's batch

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, batch: LinearAttentionMetadata) -> Tensor:
        """The decoding requests come first, with one token each; then the prefilling ones, with a piece of prompt each.

        A slot holds what its last user left, so a request's first piece starts from zero. A prompt of one token counts
        as decoding.
        """
        states, slots = self.kv_cache[0], batch.state_indices_tensor.long()
        decodes = batch.num_decodes
        outputs = []
        if decodes:
            state = _begin(states, slots[:decodes], batch.seq_lens[:decodes] > 1)
            o_THC, state = step(q[:decodes], k[:decodes], v[:decodes], log_g[:decodes], state)
            states[slots[:decodes]] = state
            outputs.append(o_THC)
        if batch.num_prefills:
            requests = slice(decodes, decodes + batch.num_prefills)
            lengths = batch.query_start_loc[decodes : requests.stop + 1].diff()
            packing = Packing.of(lengths.tolist(), q.device)
            state = _begin(states, slots[requests], batch.seq_lens[requests] > lengths)
            q, k, v, log_g = (packing.pad(x[decodes:]) for x in (q, k, v, log_g))
            o_BLHC, state = chunked(q, k, v, log_g, state)
            states[slots[requests]] = state
            outputs.append(packing.unpad(o_BLHC))
        return torch.cat(outputs)


def _begin(states: Tensor, slots: Tensor, continues: Tensor) -> Tensor:
    """The state of each request before this step: its slot's, or zero for a request that begins."""
    state = states.index_select(0, slots)
    # As integers, since the slot may hold anything before its first use and NaN · 0 is NaN; masking is slower.
    state.view(torch.int32).mul_(continues[:, None, None, None])
    return state


def state_shape(heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    return ((heads, head_dim, head_dim),)
