"""A ResNet for inference on a GPU: norms folded into convolutions, and what follows a 1×1 convolution fused into it.

Only bottlenecks gain: their 3×3 convolution is cuDNN's as it is, and its bias and ReLU are left to the kernel of the
1×1 convolution after it, which reads its output anyway.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from models.detr.resnet import Block, ResNet, fold_batch_norms


@library.custom_op("longstride::pointwise", mutates_args=())
def pointwise(
    x_BKHW: Tensor, weight_NK: Tensor, bias_N: Tensor, before_K: Tensor | None, residual_BNHW: Tensor | None
) -> Tensor:  # fmt: skip
    """relu(relu(x + before) Wᵀ + bias + residual) at every pixel; without `before` x enters as it is."""
    if before_K is not None:
        x_BKHW = F.relu(x_BKHW + before_K[:, None, None])
    y_BNHW = F.conv2d(x_BKHW, weight_NK[:, :, None, None], bias_N)
    if residual_BNHW is not None:
        y_BNHW = y_BNHW + residual_BNHW
    return F.relu(y_BNHW).contiguous(memory_format=torch.channels_last)


@pointwise.register_kernel("cuda")
def _(
    x_BKHW: Tensor, weight_NK: Tensor, bias_N: Tensor, before_K: Tensor | None, residual_BNHW: Tensor | None
) -> Tensor:  # fmt: skip
    from models.detr import pointwise_kernels

    return pointwise_kernels.pointwise(x_BKHW, weight_NK, bias_N, before_K, residual_BNHW)


@pointwise.register_fake
def _(
    x_BKHW: Tensor, weight_NK: Tensor, bias_N: Tensor, before_K: Tensor | None, residual_BNHW: Tensor | None
) -> Tensor:  # fmt: skip
    batch, _, rows, columns = x_BKHW.shape
    return x_BKHW.new_empty((batch, rows, columns, len(weight_NK))).permute(0, 3, 1, 2)


class FusedBottleneck(nn.Module):
    """A bottleneck block whose norms are folded: the same function, without gradients."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        assert block.bottleneck
        self.conv2 = block.conv2
        self.downsample: nn.Module | None = None
        last_bias_C = _bias(block.conv3)
        if block.downsample is not None:
            conv = cast(nn.Conv2d, cast(nn.Sequential, block.downsample)[0])
            last_bias_C = last_bias_C + _bias(conv)  # both are added to the same sum
            conv.bias = None
            self.downsample = conv
        self.first_weight, self.first_bias = _frozen(block.conv1.weight.flatten(1)), _frozen(_bias(block.conv1))
        self.middle_bias = _frozen(_bias(block.conv2))
        self.last_weight, self.last_bias = _frozen(block.conv3.weight.flatten(1)), _frozen(last_bias_C)
        self.conv2.bias = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        y_BCHW = self.conv2(pointwise(x_BCHW, self.first_weight, self.first_bias, None, None))
        return pointwise(y_BCHW, self.last_weight, self.last_bias, self.middle_bias, shortcut_BCHW)


@torch.no_grad()
def fuse(resnet: ResNet) -> None:
    """Fold the norms, fuse the bottlenecks and lay the weights channels last, in place.

    The result computes the same up to rounding, without gradients, and can no longer be saved as a checkpoint.
    """
    fold_batch_norms(resnet)
    for stage in [getattr(resnet, f"layer{i + 1}") for i in range(resnet.stages)]:
        for i, block in enumerate(stage):
            if block.bottleneck:
                stage[i] = FusedBottleneck(block)
    resnet.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]


def _bias(conv: nn.Module) -> Tensor:
    assert isinstance(conv.bias, Tensor)
    return conv.bias


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().clone(), requires_grad=False)
