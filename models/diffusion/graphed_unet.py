"""A UNet by CUDA graphs, in sampling and in training.

Shapes: B images, C channels, H × W latent pixels, M text tokens of width E.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.cuda_graph import WARM_UP, on_stream, record

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class GraphedUNet:
    """unet(x, time, context) on a GPU, by a graph for each shape, with and without gradients for the weights.

    A graph reads the weights where they lie, so it sees an optimizer's steps, but not a new tensor in a weight's place.
    The first call with a shape records, and later ones replay: what else the UNet does in a call does not happen again.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._graphs: dict[tuple[torch.Size, torch.Size, bool], Call] = {}

    def __call__(self, x_BCHW: Tensor, time: Tensor | float, context_BME: Tensor) -> Tensor:
        """As UNet's. The context gets no gradient."""
        time_B = torch.as_tensor(time, device=x_BCHW.device).expand(len(x_BCHW))
        key = (x_BCHW.shape, context_BME.shape, torch.is_grad_enabled())
        if key not in self._graphs:
            make = self._with_gradients if torch.is_grad_enabled() else self._without_gradients
            self._graphs[key] = make(x_BCHW, time_B, context_BME)
        return self._graphs[key](x_BCHW, time_B, context_BME)

    def _without_gradients(self, *given: Tensor) -> Call:
        with on_stream(torch.cuda.Stream()):
            for _ in range(WARM_UP):
                self._unet(*given)
        replay = record(lambda *inputs: {"output": self._unet(*inputs)}, *given)
        return lambda *given: replay(*given)["output"]

    def _with_gradients(self, *given: Tensor) -> Call:
        inputs = tuple(tensor.detach().clone() for tensor in given)
        # The graph keeps the nodes that add gradients up, and these its own stream: torch waits between the two.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        graphed: Any = torch.cuda.make_graphed_callables(_Alone(self._unet), inputs)
        if not any(with_gradients for *_, with_gradients in self._graphs):
            # The graph's gradients lie where the next replay writes; without a copy, a parameter whose .grad is None
            # would keep that very tensor, and the gradients of two batches would not add up.
            for parameter in self._unet.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(torch.clone)
        return lambda *given: graphed(*given).clone()


class _Alone(nn.Module):
    """The UNet in a module of its own: making a graph of a module changes its `forward`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_BCHW: Tensor, time_B: Tensor, context_BME: Tensor) -> Tensor:
        return self.unet(x_BCHW, time_B, context_BME)
