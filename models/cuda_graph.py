"""A function of tensors as a CUDA graph: where launching small kernels takes longer than running them, a graph launches
all at once. What uses it: agents/graphed_step.py, models/diffusion/graphed_unet.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Function = Callable[..., dict[str, Tensor]]
WARM_UP = 3  # calls before one is recorded: libraries choose kernels and take memory in them, which a graph cannot hold


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """For the calls before the recorded one: on a stream of their own, in order with the current one."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def record(function: Function, *given: Tensor) -> Function:
    """function, recorded with copies of the given tensors; call the result with others of their shapes.

    Recording changes nothing. What function reads or writes besides its inputs, such as weights, stays where it lies;
    what it returns is copied, so that the next call leaves it alone.
    """
    inputs = [tensor.clone() for tensor in given]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may use the GPU meanwhile
        outputs = function(*inputs)

    def replay(*given: Tensor) -> dict[str, Tensor]:
        for tensor, value in zip(inputs, given, strict=True):
            tensor.copy_(value)
        graph.replay()
        return {name: output.clone() for name, output in outputs.items()}

    return replay
