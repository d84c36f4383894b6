"""The convolutional half of the UNet and the autoencoder: residual blocks, and a change of resolution.

Shapes: B images, C channels, H × W pixels, D width of the time embedding. Parameter names are those of diffusers.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Group norm, SiLU, 3 × 3 convolution, twice, beside a skip connection (He et al. 2016, pre-activation).

    The time embedding is added per channel between the two (Ho et al. 2020, appendix B). time_dim: its width, or None
    for a block that knows no time.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj: nn.Module = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self._changes_width = in_channels != out_channels

    def forward(self, x_BCHW: Tensor, time_BD: Tensor | None = None) -> Tensor:
        y_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        if time_BD is not None:
            y_BCHW = y_BCHW + self.time_emb_proj(time_BD)[:, :, None, None]
        y_BCHW = self.conv2(F.silu(self.norm2(y_BCHW)))
        return y_BCHW + (self.conv_shortcut(x_BCHW) if self._changes_width else x_BCHW)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution. The UNet pads all four sides, the autoencoder right and below."""

    def __init__(self, channels: int, *, one_sided: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)
        self._one_sided = one_sided

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self._one_sided else x_BCHW)


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution. size: height and width to reach, twice the input's if None."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        return self.conv(F.interpolate(x_BCHW, size=size or (2 * height, 2 * width), mode="nearest"))
