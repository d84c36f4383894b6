"""Sequence mixers whose memory of what they have read is a state of fixed size, whatever the length.

A kind gives four pieces, and everything else follows from them: `project` and `finish` work on each token alone, `mix`
reads whole sequences (training, prompts), and `step` reads one token of each (decoding). The learner runs them over
packs, vLLM over its own batches (llm_rl/vllm_engine/recurrent_layer.py), so both compute the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from models.language.cache import StateCache
from models.language.packing import Packing

Rotation = tuple[Tensor, Tensor]  # cosines and sines of each token, from rope.rotation


class RecurrentMixer(nn.Module, ABC):
    """Base of the kinds with a state. `state_shape` is that of one sequence; a state of zeros has read nothing."""

    state_shape: tuple[int, ...]

    @abstractmethod
    def project(self, x_TD: Tensor, cos_sin: Rotation, positions_T: Tensor) -> tuple[Tensor, ...]:
        """What mixing needs of each token, [T, ...] each. All zeros must mean "no token": it is how `mix` is padded."""

    @abstractmethod
    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whole sequences, padded on the right: inputs [B, L, ...] and the state before them (None: zeros), float32
        [B, *state_shape], to outputs [B, L, ...] and the state after them."""

    @abstractmethod
    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """One token of each sequence: inputs [B, ...] and the state, to outputs [B, ...] and the new state."""

    @abstractmethod
    def finish(self, o_T: Tensor, x_TD: Tensor) -> Tensor:
        """From the mixed outputs of each token, [T, ...], and the layer's input to the layer's output, [T, D]."""

    def empty_cache(self, batch: int, max_len: int) -> StateCache:
        return StateCache(batch, self.state_shape, next(self.parameters()).device)

    def forward(self, x_TD: Tensor, packing: Packing, cos_sin: Rotation, cache: StateCache | None) -> Tensor:
        inputs = self.project(x_TD, cos_sin, packing.positions_T)
        state = None if cache is None else cache.state
        if state is not None and packing.max_len == 1:
            o_T, state = self.step(inputs, state)
        else:
            o_BL, state = self.mix([packing.pad(x) for x in inputs], state)
            o_T = packing.unpad(o_BL)
        if cache is not None:
            cache.state = state
        return self.finish(o_T, x_TD)
