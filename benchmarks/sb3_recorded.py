"""Stable-Baselines3's DDPG with its own train() recorded as a CUDA graph: the same kernels, launched at once.

Its gradient step launches many small kernels from Python, one after another; 300,000 of them took half an hour on a
GPU. What is recorded is the library's train() as it stands, on a batch that lies still; sampling, exploring, the
environment and the evaluation stay the library's as well. Scores are the library's, therefore, and speeds are not. Two
things must give way: reading a loss (`item`), of which only the logger makes use and for which a graph cannot wait, and
Adam, which is the fused one here and has to count its steps on the GPU. tests/benchmarks/test_sb3_recorded.py holds the
weights against those of the unrecorded train() with the same Adam, bit for bit.
"""

from typing import Any
from unittest import mock

import torch
from stable_baselines3 import DDPG
from torch import Tensor

from models.cuda_graph import WARM_UP, Function, on_stream, record

ADAM = {"fused": True, "capturable": True}


class LyingStill:
    """A replay buffer with one batch."""

    def __init__(self, batch: Any):
        self.batch = batch

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return self.batch


class RecordedDDPG(DDPG):
    """Raises ValueError for more than one gradient step a call, and for a learning rate that is not a number: both are
    Python's, which a graph does not follow."""

    recording: Function | None = None
    calls = 0

    def __init__(self, *args: Any, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, policy_kwargs=(policy_kwargs or {}) | {"optimizer_kwargs": ADAM}, **kwargs)
        if not isinstance(self.learning_rate, float):
            raise ValueError(f"learning_rate is {self.learning_rate!r}: a recorded step needs one number")
        self.stream = torch.cuda.Stream()

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        if gradient_steps != 1:
            raise ValueError(f"gradient_steps is {gradient_steps}: a recorded train() makes one")
        self.calls += 1
        if self.calls <= WARM_UP:
            with on_stream(self.stream):
                return super().train(gradient_steps, batch_size)
        batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        present = {name: value for name, value in batch._asdict().items() if value is not None}
        if self.recording is None:
            self.recording = record(self.own_train(type(batch), list(present), batch_size), *present.values())
        self.recording(*present.values())

    def own_train(self, kind: type[tuple], names: list[str], batch_size: int) -> Function:
        own = super().train

        def step(*values: Tensor) -> dict[str, Tensor]:
            lying_still = LyingStill(kind(**dict(zip(names, values, strict=True))))
            with mock.patch.object(self, "replay_buffer", lying_still), mock.patch.object(Tensor, "item", float_nan):
                own(1, batch_size)
            return {}

        return step


def float_nan(_: Tensor) -> float:
    return float("nan")
