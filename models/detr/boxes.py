"""Boxes as two corners or as centre and size, and their overlaps.

`xyxy`: (x0, y0, x1, y1) with x0 ≤ x1, y0 ≤ y1. `cxcywh`: (centre x, centre y, width, height).
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) → (..., 4)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) → (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Tensor) -> Tensor:
    """xyxy (..., 4) → (...)."""
    return _product(boxes[..., 2:] - boxes[..., :2])


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and generalised IoU (Rezatofighi et al., arXiv 1902.09630, algorithm 1).

    a, b: xyxy (..., 4), broadcast against each other: (N, 1, 4) and (1, M, 4) give all pairs (N, M). Two boxes without
    area have IoU 0 and, if they are not at one place, GIoU towards -1.
    """
    size_of_intersection = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = _product(size_of_intersection.clamp(min=0))
    union = area(a) + area(b) - intersection
    hull = _product(torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
    tiny = torch.finfo(a.dtype).tiny
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def _product(size: Tensor) -> Tensor:
    """Width times height; the backward pass of `prod` would make the host wait for the GPU, to look for zeros."""
    return size[..., 0] * size[..., 1]
