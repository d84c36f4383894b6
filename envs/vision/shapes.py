"""The things that scenes are made of, as coverage: how much of each pixel belongs to a thing.

A shape is its signed distance to the edge, in pixels and negative inside, so that an edge is smooth whatever its angle.
Digits are real handwriting: scikit-learn's copy of the UCI optical digits (1,797 images of 8×8).
"""

import functools
import math
from typing import Any

import numpy as np
from PIL import Image

from envs.vision.scene_spec import DIGITS

HELDOUT_DIGITS = 300  # the last of the 1,797; training scenes never show them


def coverage(kind: str, radius: float, angle: float, offset: tuple[float, float], pixels: int) -> np.ndarray:
    """Coverage (pixels, pixels) float32 in [0, 1] of a shape within its circle of `radius` pixels.

    angle: in radians, clockwise. offset: of the centre from the middle of the patch, (x, y) in pixels.
    """
    at = np.arange(pixels, dtype=np.float32) - (pixels - 1) / 2
    x, y = at[None, :] - np.float32(offset[0]), at[:, None] - np.float32(offset[1])
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    distance = _distance(kind, x * cos + y * sin, y * cos - x * sin, np.float32(radius))
    return np.clip(0.5 - distance, 0, 1)


def _distance(kind: str, x: np.ndarray, y: np.ndarray, r: np.float32) -> np.ndarray:
    match kind:
        case "circle":
            return np.hypot(x, y) - r
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.8 * r
        case "triangle":  # three lines at half the radius from the centre
            slope = np.float32(math.sqrt(3) / 2)
            return np.maximum(y, np.abs(x) * slope - y * 0.5) - 0.5 * r
        case "cross":
            x, y = np.abs(x), np.abs(y)
            return np.minimum(np.maximum(x - r, y - 0.35 * r), np.maximum(x - 0.35 * r, y - r))
        case "star":  # folded into half of one of its five points
            point = np.float32(2 * math.pi / 5)
            around = np.abs((np.arctan2(x, -y) + point / 2) % point - point / 2)
            away = np.hypot(x, y)
            inner = 0.42
            tip, notch = (1.0, 0.0), (inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5))
            edge = (notch[0] - tip[0], notch[1] - tip[1])
            length = math.hypot(*edge)
            along, across = away * np.cos(around) - r, away * np.sin(around)
            return (across * np.float32(-edge[0] / length) + along * np.float32(edge[1] / length)).astype(np.float32)
    raise ValueError(f"{kind} is no shape")


@functools.cache
def _all_digits() -> Any:
    from sklearn.datasets import load_digits  # a second to import, and scenes of shapes alone can do without

    return load_digits()


@functools.cache
def handwriting(digit: str, heldout: bool) -> list[np.ndarray]:
    """All images of one digit, cut to the ink: (h, w) uint8."""
    digits = _all_digits()
    part = slice(-HELDOUT_DIGITS, None) if heldout else slice(None, -HELDOUT_DIGITS)
    images, labels = digits.images[part], digits.target[part]
    found = []
    for image in images[labels == DIGITS.index(digit)]:
        rows, columns = np.flatnonzero((image > 4).any(1)), np.flatnonzero((image > 4).any(0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        found.append((ink * (255 / 16)).astype(np.uint8))
    return found


def written(image: np.ndarray, radius: float, pixels: int) -> np.ndarray:
    """Coverage (pixels, pixels) float32 of a digit's image, 2 · `radius` pixels high, in the middle of the patch."""
    height = max(4, min(pixels, round(2 * radius)))
    width = max(3, min(pixels, round(height * image.shape[1] / image.shape[0])))
    # Bordered first: interpolation would otherwise smear the ink's edge outwards.
    bordered = np.pad(image, 1)
    scaled = Image.fromarray(bordered).resize(
        (round(width * bordered.shape[1] / image.shape[1]), round(height * bordered.shape[0] / image.shape[0])),
        Image.Resampling.BICUBIC,
    )
    ink = np.clip((np.asarray(scaled, np.float32) / 255 - 0.3) / 0.3, 0, 1)
    top, left = (ink.shape[0] - height) // 2, (ink.shape[1] - width) // 2
    patch = np.zeros((pixels, pixels), np.float32)
    row, column = (pixels - height) // 2, (pixels - width) // 2
    patch[row : row + height, column : column + width] = ink[top : top + height, left : left + width]
    return patch
