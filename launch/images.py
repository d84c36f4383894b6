"""A run's pictures: one PNG a call, all of its images side by side."""

import io
import math
import os
from pathlib import Path

import numpy as np

from launch.disk import sync_directory, sync_file

_GAP = 2  # black pixels between two images


def grid(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) uint8 in rows of about √N: (H', W', 3)."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images must be (N, H, W, 3) uint8 with N > 0, not {images.shape} {images.dtype}")
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.zeros((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: Path, picture: np.ndarray) -> None:
    """Replace the file in one step. picture: (H, W, 3) uint8. Raises OSError."""
    from PIL import Image  # tensorboard brings it; a run that draws nothing need not load it

    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_bytes(content.getvalue())
    sync_file(draft)
    draft.replace(path)
    sync_directory(path.parent)
