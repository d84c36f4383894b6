"""A gradient step by a CUDA graph. The networks of control agents are small: launching the kernels of a step takes much
longer than running them, and a graph launches all at once."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., dict[str, Tensor]]
FIRST = 3  # steps that are taken as they are, before one is recorded


class GraphedStep:
    """step(*inputs) on a GPU, recorded once and replayed; the shapes of the inputs must stay.

    The step may change weights, and has to do so in place; it returns figures. The first three calls just take the
    step: optimizers make their moments in them, and libraries choose kernels, which a graph cannot do.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self._calls += 1
        if self._calls <= FIRST:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*constructed with capturable=True")  # for the steps that follow
                figures = self._step(*inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return figures
        if self._calls == FIRST + 1:
            self._record(inputs)
        for tensor, value in zip(self._inputs, inputs, strict=True):
            tensor.copy_(value)
        self._graph.replay()
        return {name: figure.clone() for name, figure in self._figures.items()}

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Environments may use the GPU in another thread meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._figures = self._step(*self._inputs)
