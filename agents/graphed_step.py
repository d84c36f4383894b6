"""A gradient step by a CUDA graph: the networks of control agents are small."""

import warnings

import torch
from torch import Tensor

from models.cuda_graph import WARM_UP, Function, on_stream, record


class GraphedStep:
    """step(*inputs) on a GPU, recorded once and replayed; the shapes of the inputs must stay.

    The step may change weights, and has to do so in place; it returns figures. The first calls just take the step:
    optimizers make their moments in them, which a graph cannot do.
    """

    def __init__(self, step: Function) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self._calls += 1
        if self._calls <= WARM_UP:
            with on_stream(self._stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # for the steps that follow
                return self._step(*inputs)
        if self._calls == WARM_UP + 1:
            self._step = record(self._step, *inputs)
        return self._step(*inputs)
