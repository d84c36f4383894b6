"""One labelled image, and a padded batch of them: what every source of images gives and every trainer takes.

B images, H×W pixels, T objects at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.detr.detr import normalise_images
from models.detr.targets import Targets

_TORCH = {np.uint8: torch.uint8, np.int16: torch.int16, np.int64: torch.int64, np.float32: torch.float32,
          np.bool_: torch.bool}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """boxes are xyxy in pixels. ids: i + 1 where object i is seen, 0 where none is; None without masks."""

    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float32
    ids: np.ndarray | None = None  # (H, W) int16


@dataclass(frozen=True)
class Batch:
    """Arrays, so that it crosses processes as they are; `to_device` makes the tensors that a model takes.

    Masks travel as one map of object numbers an image, T times smaller than T masks.
    """

    images_BHWC: np.ndarray  # uint8, zeros at padding
    sizes_B2: np.ndarray  # int64: height and width before padding
    labels_BT: np.ndarray  # int64
    boxes_BT4: np.ndarray  # float32, cxcywh relative to the image
    valid_BT: np.ndarray  # bool
    ids_BHW: np.ndarray | None  # uint8, or int16 if an image has more than 255 objects

    def to_device(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> "DeviceBatch":
        pinned = torch.device(device).type == "cuda"

        def move(array: np.ndarray) -> Tensor:
            """Copied in any case: an actor's answer is shared memory that may not be written to."""
            staged = torch.empty(array.shape, dtype=_TORCH[array.dtype.type], pin_memory=pinned)
            staged.numpy()[...] = array
            return staged.to(device, non_blocking=True)

        images = normalise_images(move(self.images_BHWC), dtype)
        labels, boxes, valid = move(self.labels_BT), move(self.boxes_BT4), move(self.valid_BT)
        masks = None
        if self.ids_BHW is not None:
            ids = move(self.ids_BHW)
            numbers_T = torch.arange(1, labels.shape[1] + 1, dtype=ids.dtype, device=device)
            masks = ids[:, None] == numbers_T[:, None, None]
        height, width = self.images_BHWC.shape[1:3]
        pixels = None
        if (self.sizes_B2 != (height, width)).any():
            sizes = move(self.sizes_B2)
            rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
            pixels = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
            images = images * pixels[:, None]
        return DeviceBatch(images, pixels, Targets(labels, boxes, valid, masks))


@dataclass(frozen=True)
class TrueSegments:
    """What panoptic quality is measured on: segment numbers at the image's own size, and the labels they have. What has
    no label is void; crowds are numbers too."""

    ids: np.ndarray  # (H, W) int16
    labels: dict[int, int]
    crowds: frozenset[int] = frozenset()


@dataclass(frozen=True)
class HeldoutBatch:
    """Held-out images that could be read: their numbers in the source, and their batch; None if there is none."""

    numbers: list[int]
    batch: Batch | None
    segments: list[TrueSegments] = field(default_factory=list)  # with masks, of each image


def true_segments(example: Example) -> TrueSegments:
    """Of an example with masks."""
    assert example.ids is not None
    return TrueSegments(example.ids, {i: label for i, label in enumerate(example.labels.tolist(), start=1)})


@dataclass(frozen=True)
class DeviceBatch:
    images_BCHW: Tensor
    valid_BHW: Tensor | None  # None: nothing is padded
    targets: Targets


def collate(examples: Sequence[Example]) -> Batch:
    """Pad images at the right and below, objects at the end."""
    count = len(examples)
    sizes = np.array([e.image.shape[:2] for e in examples], np.int64)
    height, width = sizes.max(0)
    objects = max(1, *(len(e.labels) for e in examples))
    with_masks = all(e.ids is not None for e in examples)
    arrays: dict[str, Any] = {
        "images_BHWC": np.zeros((count, height, width, 3), np.uint8),
        "labels_BT": np.zeros((count, objects), np.int64),
        "boxes_BT4": np.zeros((count, objects, 4), np.float32),
        "valid_BT": np.zeros((count, objects), bool),
        "ids_BHW": np.zeros((count, height, width), np.uint8 if objects < 256 else np.int16) if with_masks else None,
    }
    for i, example in enumerate(examples):
        h, w = example.image.shape[:2]
        n = len(example.labels)
        arrays["images_BHWC"][i, :h, :w] = example.image
        arrays["labels_BT"][i, :n] = example.labels
        arrays["valid_BT"][i, :n] = True
        low, high = example.boxes[:, :2], example.boxes[:, 2:]
        arrays["boxes_BT4"][i, :n] = np.concatenate([(low + high) / 2, high - low], 1) / np.array(
            [w, h, w, h], np.float32
        )
        if with_masks:
            arrays["ids_BHW"][i, :h, :w] = example.ids
    return Batch(sizes_B2=sizes, **arrays)
