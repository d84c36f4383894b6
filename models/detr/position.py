"""Sine position embedding in two dimensions (arXiv 2005.12872, section A.4)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000
EPS = 1e-6


def sine_position(valid_BHW: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Positions (B, H, W, D) of a feature map's cells: half of the D numbers for y, half for x.

    valid_BHW: False at padding. Coordinates count valid cells and are scaled to (0, 2π] over an image's own extent, so
    that an image has the same positions whatever it is padded to.
    """
    counts = valid_BHW.float()
    y_BHW, x_BHW = counts.cumsum(1), counts.cumsum(2)
    y_BHW = y_BHW / (y_BHW[:, -1:] + EPS) * (2 * math.pi)
    x_BHW = x_BHW / (x_BHW[:, :, -1:] + EPS) * (2 * math.pi)
    half = dim // 2
    exponents = torch.arange(0, half, 2, device=valid_BHW.device, dtype=torch.float32) / half
    wavelengths = TEMPERATURE**exponents

    def waves(coordinate_BHW: Tensor) -> Tensor:
        angle = coordinate_BHW[..., None] / wavelengths
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)  # sin, cos, sin, cos, ...

    return torch.cat([waves(y_BHW), waves(x_BHW)], -1).to(dtype)
