"""A detector on the held-out images of its run: its figures, and pictures of what it finds."""

from typing import TYPE_CHECKING

import numpy as np

from agents.vision.detection_score import detect, evaluate_detector
from agents.vision.pictures import with_boxes
from agents.vision.prefetch import in_order
from envs.vision.sources import Source
from models.detr.detr import Detr
from models.detr.postprocess import without

if TYPE_CHECKING:
    from agents.vision.detr import DetrJobConfig
    from agents.vision.detr_rl import DetrRLConfig
    from launch.run import ActorGroup, Run

SHOWN = 16  # images drawn with their boxes at each evaluation
_THRESHOLD = 0.5  # of the score of a box that is drawn


def evaluation(
    config: "DetrJobConfig | DetrRLConfig", model: Detr, loaders: "ActorGroup", source: Source, run: "Run"
) -> dict[str, float]:
    """Figures of the first `eval_images` images, as `evaluate_detector` names them."""
    count = min(config.eval_images, len(source))
    spans = [(first, min(config.batch_size, count - first)) for first in range(0, count, config.batch_size)]
    batches = (batch for batch, _ in in_order(loaders, "heldout_batch", spans, config.loader_timeout_s))
    return evaluate_detector(model, batches, source, count, run.device)


def show(
    config: "DetrJobConfig | DetrRLConfig", model: Detr, step: int, loaders: "ActorGroup", source: Source, run: "Run"
) -> None:
    """Draw what is found in the first images, as heldout/boxes of the run's images."""
    count = min(SHOWN, len(source))
    heldout, _ = next(in_order(loaders, "heldout_batch", [(0, count)], config.loader_timeout_s))
    batch = heldout.batch
    if batch is None:  # none of these can be read
        return
    found = detect(model, batch, [(int(h), int(w)) for h, w in batch.sizes_B2], run.device, _THRESHOLD)
    things = [without(d, source.stuff) for d in found]
    pictures = [with_boxes(image, d, source.names) for image, d in zip(batch.images_BHWC, things)]
    run.images(step, "heldout/boxes", np.stack(pictures))
