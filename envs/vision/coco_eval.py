"""COCO's average precision, by pycocotools, on records in memory."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.detr.postprocess import Detections

# COCOeval's twelve figures, in its order.
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
           "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip


def detection_records(number: int, found: Detections, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of image `number` as COCO's results."""
    boxes = found.boxes.double().cpu().numpy()
    records = []
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist())):
        x0, y0, x1, y1 = boxes[i].tolist()
        records.append({"image_id": number, "category_id": category_ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "score": score})  # fmt: skip
    return records


def average_precision(dataset: dict[str, Any], results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The twelve figures of COCOeval on boxes: dataset as in an instances file, results as in a results file.

    A figure is -1 where the dataset has nothing to measure it on (no small objects, say), as COCOeval has it.
    """
    results = list(results)
    if not dataset["annotations"]:
        return dict.fromkeys(FIGURES, -1.0)
    if not results:
        return dict.fromkeys(FIGURES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        # loadRes asks for these two, and a dataset made in memory need not have them.
        dataset.setdefault("info", {})
        dataset.setdefault("licenses", [])
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(FIGURES, evaluation.stats)}
