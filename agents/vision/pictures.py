"""Tensors of images as the bytes that files, rewards and people look at."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models.detr.postprocess import Detections

ENLARGED = 3  # pictures with boxes, so that their text can be read


def as_bytes(images_BCHW: Tensor) -> np.ndarray:
    """[0, 1] to (B, H, W, C) uint8."""
    return (images_BCHW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def with_boxes(image_HWC: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """A copy of an image (H, W, 3) uint8, three times larger, with each box, its class and its score drawn in."""
    height, width = image_HWC.shape[:2]
    picture = Image.fromarray(image_HWC).resize((width * ENLARGED, height * ENLARGED), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for box, label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist()):
        corners = [v * ENLARGED for v in box]
        draw.rectangle(corners, outline=(0, 255, 0))
        draw.text((corners[0] + 2, corners[1] + 1), f"{names[label]} {score:.2f}", fill=(0, 255, 0))
    return np.asarray(picture)
