"""Where to look next, from afar: what stands out, less what was looked at.

A coarse form of the saliency map of Itti, Koch and Niebur (1998, "A model of saliency-based visual attention for rapid
scene analysis"): local contrast on cells, above what is usual in the image, with inhibition of return.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.errors import UserError

GAIN = 4.0  # a patch of full contrast, half black and half white, has a deviation of 1/2


def salience(image_HWC: np.ndarray, cells: int) -> np.ndarray:
    """uint8 (H, W, 3) → float32 (cells, cells) in [0, 1].

    The standard deviation of the pixels in each cell, mean over the channels, above the median of all cells: a
    background with a texture does not stand out. Raises UserError if the sides are no multiples of `cells`.
    """
    height, width = image_HWC.shape[:2]
    if height % cells or width % cells:
        raise UserError(f"salience: an image of {height}×{width} pixels has no {cells}×{cells} cells of one size")
    pixels_3HW = torch.from_numpy(image_HWC).permute(2, 0, 1).float() / 255
    cell = height // cells, width // cells
    variance_3hw = F.avg_pool2d(pixels_3HW.square(), cell) - F.avg_pool2d(pixels_3HW, cell).square()
    contrast = variance_3hw.clamp(min=0).sqrt().mean(0).numpy()
    return (GAIN * (contrast - np.median(contrast))).clip(0, 1)


def inhibit(salience_hw: np.ndarray, region: tuple[slice, slice], left: float) -> None:
    """Inhibition of return, in place: of what stood out in a region that was looked at, `left` is left."""
    salience_hw[region] *= left
