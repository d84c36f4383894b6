"""ResNet v1.5, DETR's backbone (He et al., arXiv 1512.03385). Names of parameters are torchvision's and timm's."""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detr.config import ResNetConfig

EXPANSION = 4  # of a bottleneck's last convolution over its 3×3 one


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: what remains of it when batches are small.

    weight, bias, running_mean, running_var are buffers, so no optimizer sees them.
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The two vectors (C,) that the norm comes to."""
        weight, bias = cast(Tensor, self.weight), cast(Tensor, self.bias)
        mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        scale = weight * (variance + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        scale_C, shift_C = self.scale_and_shift()
        return x_BCHW * scale_C[:, None, None] + shift_C[:, None, None]


class Block(nn.Module):
    """Either kind of residual block: two 3×3 convolutions, or 1×1, 3×3, 1×1 (bottleneck)."""

    def __init__(
        self,
        kind: str,
        inputs: int,
        outputs: int,
        stride: int,
        dilation: int,
        shortcut_dilates: bool,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.bottleneck = kind == "bottleneck"
        if self.bottleneck:
            inner = outputs // EXPANSION
            self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
            self.bn1 = norm(inner)
            self.conv2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation, bias=False)
            self.bn2 = norm(inner)
            self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
            self.bn3 = norm(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
            self.bn1 = norm(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
            self.bn2 = norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs or shortcut_dilates:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        x_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        x_BCHW = self.bn2(self.conv2(x_BCHW))
        if self.bottleneck:
            x_BCHW = self.bn3(self.conv3(F.relu(x_BCHW)))
        return F.relu(x_BCHW + shortcut_BCHW)


class ResNet(nn.Module):
    """Images (B, 3, H, W) → the feature maps of all stages, at strides 4, 8, 16, 32.

    frozen: FrozenBatchNorm2d throughout, as DETR has it for a pretrained backbone. Otherwise batch norm learns (for
    training from scratch); in eval mode both compute the same, from the same state.
    """

    def __init__(self, config: ResNetConfig, frozen: bool = True) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
        self.stages = len(config.depths)
        self.conv1 = nn.Conv2d(3, config.embedding_size, 7, 2, 3, bias=False)
        self.bn1 = norm(config.embedding_size)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = config.embedding_size
        for i, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes)):
            dilate = config.dilation and i == self.stages - 1
            first_stride = 1 if i == 0 or dilate else 2
            # torchvision: the first block of a dilated stage keeps the dilation of the stage before it, 1.
            blocks = [Block(config.layer_type, channels, width, first_stride, 1, dilate, norm)]
            blocks += [
                Block(config.layer_type, width, width, 1, 2 if dilate else 1, False, norm) for _ in range(depth - 1)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            channels = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW = self.maxpool(F.relu(self.bn1(self.conv1(x_BCHW))))
        features = []
        for i in range(self.stages):
            x_BCHW = getattr(self, f"layer{i + 1}")(x_BCHW)
            features.append(x_BCHW)
        return features


@torch.no_grad()
def fold_batch_norms(resnet: ResNet) -> None:
    """Multiply the constants of every frozen norm into the convolution before it, in place: faster inference.

    The result computes the same up to rounding, and can no longer be saved under the names of a checkpoint.
    """
    for module in list(resnet.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                scale_C, shift_C = norm.scale_and_shift()
                conv.weight.mul_(scale_C[:, None, None, None])
                conv.bias = nn.Parameter(shift_C.to(conv.weight.dtype))
                setattr(module, name, nn.Identity())
