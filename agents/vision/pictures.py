"""Tensors of images as the bytes that files, rewards and people look at."""

import numpy as np
import torch
from torch import Tensor


def as_bytes(images_BCHW: Tensor) -> np.ndarray:
    """[0, 1] to (B, H, W, C) uint8."""
    return (images_BCHW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
