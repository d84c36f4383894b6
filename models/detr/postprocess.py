"""From predictions to boxes in pixels, and to panoptic segments.

B images, Q queries, C classes with "no object" last.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.detr.boxes import cxcywh_to_xyxy
from models.detr.detr import DetrOutput


@dataclass(frozen=True)
class Detections:
    """Objects found in one image. queries: which query found each."""

    scores: Tensor  # (n,)
    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, 4) xyxy in pixels
    queries: Tensor  # (n,) int64


@dataclass(frozen=True)
class Segment:
    id: int
    label: int
    score: float


@dataclass(frozen=True)
class Panoptic:
    """Every pixel's segment: `ids` (H, W) int32, 0 where there is none."""

    ids: Tensor
    segments: list[Segment]


def detections(output: DetrOutput, sizes: Sequence[tuple[int, int]], threshold: float = 0.0) -> list[Detections]:
    """Each query's best class but "no object", where its probability exceeds `threshold`.

    sizes: (height, width) of each image, to whose pixels the boxes are scaled.
    """
    scores_BQ, labels_BQ = output.logits_BQC.float().softmax(-1)[..., :-1].max(-1)
    boxes_BQ4 = cxcywh_to_xyxy(output.boxes_BQ4.float())
    found = []
    for scores, labels, boxes, (height, width) in zip(scores_BQ, labels_BQ, boxes_BQ4, sizes, strict=True):
        queries = (scores > threshold).nonzero().squeeze(1)
        scale = boxes.new_tensor([width, height, width, height])
        found.append(Detections(scores[queries], labels[queries], boxes[queries] * scale, queries))
    return found


def without(found: Detections, labels: Collection[int]) -> Detections:
    """The detections but those of certain labels (of stuff, say)."""
    kept = torch.tensor([label not in labels for label in found.labels.tolist()], dtype=torch.bool)
    kept = kept.to(found.labels.device)
    return Detections(found.scores[kept], found.labels[kept], found.boxes[kept], found.queries[kept])


def panoptic(
    output: DetrOutput,
    sizes: Sequence[tuple[int, int]],
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    stuff: Collection[int] = (),
    padded: Sequence[tuple[int, int]] | None = None,
) -> list[Panoptic]:
    """Give each pixel to the query whose score × mask probability is greatest there.

    A query counts if its best class is an object, of probability above `threshold`. A segment that keeps no more than
    `overlap_threshold` of the pixels where its weighted mask exceeds `mask_threshold` is dropped. Segments of the same
    class in `stuff` become one. sizes: (height, width) of the results. padded: if the batch was padded, the part
    (height, width) of the mask logits that each image takes.

    Raises ValueError for a model without a mask head.
    """
    if output.masks_BQHW is None:
        raise ValueError("this model predicts no masks")
    scores_BQ, labels_BQ = output.logits_BQC.float().softmax(-1).max(-1)
    kept_BQ = (labels_BQ < output.logits_BQC.shape[-1] - 1) & (scores_BQ > threshold)
    kept, scores, labels = kept_BQ.cpu(), scores_BQ.tolist(), labels_BQ.tolist()
    results = []
    for i, size in enumerate(sizes):
        queries = kept[i].nonzero().squeeze(1)
        masks = output.masks_BQHW[i].index_select(0, queries.to(output.masks_BQHW.device, non_blocking=True)).float()
        if padded is not None:
            masks = masks[:, : padded[i][0], : padded[i][1]]
        found = [(labels[i][q], scores[i][q]) for q in queries.tolist()]
        results.append(_segments(masks.sigmoid(), found, size, mask_threshold, overlap_threshold, stuff))
    return results


def _segments(
    probabilities: Tensor,
    found: Sequence[tuple[int, float]],
    size: tuple[int, int],
    mask_threshold: float,
    overlap_threshold: float,
    stuff: Collection[int],
) -> Panoptic:
    """found: label and score of each mask."""
    if not found:
        return Panoptic(torch.zeros(size, dtype=torch.int32, device=probabilities.device), [])
    scores = torch.tensor([score for _, score in found]).to(probabilities.device, non_blocking=True)
    probabilities = F.interpolate(probabilities[None], size=size, mode="bilinear")[0] * scores[:, None, None]
    owner = probabilities.argmax(0)
    owns = owner == torch.arange(len(found), device=owner.device)[:, None, None]
    owned, claimed = torch.stack([owns, probabilities >= mask_threshold]).sum((2, 3)).tolist()
    segments: list[Segment] = []
    of_stuff: dict[int, int] = {}
    ids = []  # of the masks
    for (label, score), pixels, most in zip(found, owned, claimed):
        if pixels == 0 or most == 0 or pixels / most <= overlap_threshold:
            ids.append(0)
        elif label in of_stuff:
            ids.append(of_stuff[label])
        else:
            segments.append(Segment(len(segments) + 1, label, score))
            ids.append(segments[-1].id)
            if label in stuff:
                of_stuff[label] = segments[-1].id
    return Panoptic(torch.tensor(ids, dtype=torch.int32).to(owner.device, non_blocking=True)[owner], segments)
