"""Flipping and resizing of labelled images: DETR's augmentation without its crops (arXiv 2005.12872, section 4)."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from envs.vision.example import Example
from models.errors import UserError


@dataclass(frozen=True)
class ResizeConfig:
    shortest: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """The shorter side in pixels: one of these in training, the last in evaluation."""
    longest: int = 1333
    """At most, of the longer side."""

    def __post_init__(self) -> None:
        if not self.shortest or min(self.shortest) < 32 or self.longest < max(self.shortest):
            raise UserError(f"resize: sides {list(self.shortest)} and longest {self.longest} do not fit together")


def resized(example: Example, config: ResizeConfig, rng: np.random.Generator | None) -> Example:
    """rng: draws the shorter side; without it, the last of the configuration's."""
    height, width = example.image.shape[:2]
    side = config.shortest[-1] if rng is None else int(rng.choice(config.shortest))
    scale = min(side / min(height, width), config.longest / max(height, width))
    new_width, new_height = round(width * scale), round(height * scale)
    image = Image.fromarray(example.image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    factors = np.array([new_width / width, new_height / height] * 2, np.float32)
    ids = example.ids
    if ids is not None:  # nearest: numbers cannot be mixed
        rows = (np.arange(new_height) + 0.5) * height / new_height
        columns = (np.arange(new_width) + 0.5) * width / new_width
        ids = ids[rows.astype(int)[:, None], columns.astype(int)]
    return replace(example, image=np.asarray(image), boxes=example.boxes * factors, ids=ids)


def flipped(example: Example, rng: np.random.Generator) -> Example:
    """Left to right, with probability 1/2."""
    if rng.random() < 0.5:
        return example
    width = example.image.shape[1]
    boxes = example.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    ids = None if example.ids is None else np.ascontiguousarray(example.ids[:, ::-1])
    return replace(example, image=np.ascontiguousarray(example.image[:, ::-1]), boxes=boxes, ids=ids)
