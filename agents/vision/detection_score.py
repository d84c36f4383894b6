"""How well a detector does on held-out images: COCO's AP on things, panoptic quality if it has masks."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from envs.vision.box_quality import box_quality
from envs.vision.coco_eval import average_precision, detection_records
from envs.vision.example import Batch, HeldoutBatch
from envs.vision.panoptic_quality import PanopticQuality
from envs.vision.sources import Source
from models.detr.boxes import cxcywh_to_xyxy
from models.detr.detr import Detr, DetrOutput
from models.detr.postprocess import Detections, Panoptic, detections, panoptic, without
from models.errors import UserError

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


@torch.no_grad()
def evaluate_detector(
    model: Detr, batches: Iterable[HeldoutBatch], source: Source, count: int, device: str
) -> dict[str, float]:
    """batches: the first `count` held-out images of the source, but those that cannot be read. Boxes are scored in the
    batches' pixels, relative to the image, so resizing changes no figure.

    Figures that there is nothing to measure on are left out: AP, where the images show no things. Raises UserError if
    no image could be read, and as `refuse_divergence` does.
    """
    model.eval()
    truth = source.truth(range(count))
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    records: list[dict[str, Any]] = []
    quality = PanopticQuality()
    answers: list[float] = []
    seen: set[int] = set()
    for heldout in batches:
        batch, numbers = heldout.batch, heldout.numbers
        if batch is None:
            continue
        seen.update(numbers)
        there = batch.to_device(device)
        predicted = model(there.images_BCHW, there.valid_BHW)
        output = _on_cpu(predicted)
        refuse_divergence(output)
        for i, found in zip(numbers, detections(output, [sizes[i] for i in numbers])):
            records += detection_records(i, without(found, source.stuff), source.category_ids)
        answers += answer_qualities(output, batch, source.stuff)
        if predicted.masks_BQHW is not None:
            _score_masks(quality, heldout, predicted, source)
    if not seen:
        raise UserError(f"none of {count} held-out images can be read")
    figures = average_precision(_of(truth, seen), records)
    result = {f"eval/{name}": figures[name] for name in SHOWN if figures[name] >= 0}
    result["eval/quality"] = float(np.mean(answers))
    if quality.classes:
        result |= {f"eval/{name}": value for name, value in quality.result(source.stuff).items()}
    return result


def _of(truth: dict[str, Any], seen: Collection[int]) -> dict[str, Any]:
    """The truth without the images that could not be read."""
    return truth | {
        "images": [image for image in truth["images"] if image["id"] in seen],
        "annotations": [annotation for annotation in truth["annotations"] if annotation["image_id"] in seen],
    }


def refuse_divergence(output: DetrOutput) -> None:
    """Raises UserError if classes or boxes are not finite."""
    if not (torch.isfinite(output.logits_BQC).all() & torch.isfinite(output.boxes_BQ4).all()):
        raise UserError(
            "the detector's answers are not finite, its weights have diverged: train again with a lower learning rate"
        )


def answer_qualities(output: DetrOutput, batch: Batch, stuff: Collection[int]) -> list[float]:
    """`box_quality` of each image's plain answer: the things of all queries whose likeliest class is one."""
    labels_BQ = output.logits_BQC.argmax(-1).numpy()
    boxes_BQ4 = cxcywh_to_xyxy(output.boxes_BQ4).numpy()
    no_thing = [*stuff, output.logits_BQC.shape[-1] - 1]
    qualities = []
    for i, valid in enumerate(batch.valid_BT):
        given, wanted = ~np.isin(labels_BQ[i], no_thing), valid & ~np.isin(batch.labels_BT[i], list(stuff))
        truth = cxcywh_to_xyxy(torch.from_numpy(batch.boxes_BT4[i, wanted])).numpy()
        qualities.append(box_quality(boxes_BQ4[i, given], labels_BQ[i, given], truth, batch.labels_BT[i, wanted]))
    return qualities


@torch.no_grad()
def detect(
    model: Detr, batch: Batch, sizes: Sequence[tuple[int, int]], device: str, threshold: float
) -> list[Detections]:
    """What a model finds in a batch, on the CPU; boxes in the pixels of images of these (height, width)."""
    there = batch.to_device(device)
    return detections(_on_cpu(model.eval()(there.images_BCHW, there.valid_BHW, masks=False)), sizes, threshold)


def _on_cpu(output: DetrOutput) -> DetrOutput:
    """The last layer's classes and boxes: a few numbers, where the masks of a batch are many."""
    return DetrOutput(output.logits_LBQC[-1:].float().cpu(), output.boxes_LBQ4[-1:].float().cpu())


def _score_masks(quality: PanopticQuality, heldout: HeldoutBatch, output: DetrOutput, source: Source) -> None:
    """At the images' own size, whatever the batch's."""
    assert heldout.batch is not None
    assert output.masks_BQHW is not None
    height, width = heldout.batch.images_BHWC.shape[1:3]
    rows, columns = output.masks_BQHW.shape[-2:]
    parts = [(-(-int(h) * rows // height), -(-int(w) * columns // width)) for h, w in heldout.batch.sizes_B2]
    sizes = [truth.ids.shape for truth in heldout.segments]
    if sizes:  # else a folder of boxes
        for truth, found in zip(heldout.segments, panoptic(output, sizes, stuff=source.stuff, padded=parts)):
            quality.add(truth.ids, truth.labels, *_found(found), truth.crowds)


def _found(found: Panoptic) -> tuple[np.ndarray, dict[int, int]]:
    return found.ids.cpu().numpy(), {segment.id: segment.label for segment in found.segments}
