"""The learner's recurrent mixers inside vLLM, which keeps each request's state in a slot of fixed size.

vLLM wants slots of one shape for the whole model, so a slot is a row of numbers, as long as the largest layer's state;
a layer uses the beginning of its own.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from models.language.config import LanguageConfig
from models.language.mixers import MIXERS
from models.language.packing import Packing
from models.language.recurrent import RecurrentMixer
from models.language.rope import inverse_frequencies, rotation


class RecurrentLayer(nn.Module, MambaBase):
    """A mixer of the learner's over vLLM's batch of decoding and prefilling requests."""

    def __init__(self, config: LanguageConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.mixer = cast(RecurrentMixer, MIXERS[config.mixer_kind(layer)](config))
        for name, child in list(self.mixer.named_children()):
            if isinstance(child, nn.Linear):  # vLLM's own, for its kernels and adapters
                linear = ReplicatedLinear(
                    child.in_features, child.out_features, bias=False, prefix=f"{prefix}.{name}", return_bias=False
                )
                setattr(self.mixer, name, linear)
        self.slot_shape = state_shape(config)
        self.rope_frequency = inverse_frequencies(config.rope, config.head_dim)
        # vLLM finds the layers that keep state here, and puts their slots in kv_cache.
        vllm_config.compilation_config.static_forward_context[prefix] = self
        self.kv_cache = (torch.tensor([]),)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.slot_shape

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory before there are any slots
            return x_TD
        batch = metadata[self.prefix]
        tokens = batch.num_decode_tokens + batch.num_prefill_tokens
        x, positions_T = x_TD[:tokens], positions[:tokens]
        self.rope_frequency = self.rope_frequency.to(x.device)
        cos_sin = rotation(self.rope_frequency, positions_T, x.dtype)
        o_T = self._mix(self.mixer.project(x, cos_sin, positions_T), batch)
        y_TD = self.mixer.finish(o_T, x)
        return F.pad(y_TD, (0, 0, 0, x_TD.shape[0] - tokens))  # rows that only fill a captured graph's batch

    def _mix(self, inputs: tuple[Tensor, ...], batch: LinearAttentionMetadata) -> Tensor:
        """The decoding requests come first, with one token each; then the prefilling ones, with a piece of prompt each.

        A slot holds what its last user left, so a request's first piece starts from zero. A prompt of one token counts
        as decoding.
        """
        slots, decodes = batch.state_indices_tensor.long(), batch.num_decodes
        outputs = []
        if decodes:
            state = self._begin(slots[:decodes], batch.seq_lens[:decodes] > 1)
            o_T, state = self.mixer.step([x[:decodes] for x in inputs], state)
            self._end(slots[:decodes], state)
            outputs.append(o_T)
        if batch.num_prefills:
            requests = slice(decodes, decodes + batch.num_prefills)
            lengths = batch.query_start_loc[decodes : requests.stop + 1].diff()
            packing = _prefills(batch, lengths)
            state = self._begin(slots[requests], batch.seq_lens[requests] > lengths)
            o_BL, state = self.mixer.mix([packing.pad(x[decodes:]) for x in inputs], state)
            self._end(slots[requests], state)
            outputs.append(packing.unpad(o_BL))
        return torch.cat(outputs)

    def _begin(self, slots: Tensor, continues: Tensor) -> Tensor:
        """The state of each request before this step: its slot's, or zero for a request that begins."""
        shape = self.mixer.state_shape
        state = self.kv_cache[0][:, : math.prod(shape)].index_select(0, slots)
        # As integers, since the slot may hold anything before its first use and NaN · 0 is NaN; masking is slower.
        state.view(torch.int32).mul_(continues[:, None])
        return state.unflatten(1, shape)

    def _end(self, slots: Tensor, state: Tensor) -> None:
        self.kv_cache[0][slots, : math.prod(self.mixer.state_shape)] = state.flatten(1)


def _prefills(batch: Any, lengths: Tensor) -> Packing:
    """How the pieces of prompts lie in the batch. Kept on it for the layers that follow: reading lengths waits for the
    GPU."""
    if not hasattr(batch, "prefill_packing"):
        batch.prefill_packing = Packing.of(lengths.tolist(), lengths.device)
    return batch.prefill_packing


def state_shape(config: LanguageConfig) -> tuple[tuple[int, ...], ...]:
    """One row that holds the state of any layer."""
    with torch.device("meta"):
        mixers = [MIXERS[kind](config) for kind in {config.mixer_kind(i) for i in range(config.num_hidden_layers)}]
    sizes = [math.prod(mixer.state_shape) for mixer in mixers if isinstance(mixer, RecurrentMixer)]
    return ((max(sizes, default=1),),)
