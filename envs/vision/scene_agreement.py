"""Does a picture show what its caption asks for? A detector looks (DETR trained on scenes)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from envs.vision.scene_spec import KINDS, ObjectSpec, parse_caption
from models.detr.checkpoint import load_detr
from models.detr.detr import normalise_images
from models.detr.postprocess import Detections, detections
from models.errors import UserError

THRESHOLD = 0.5  # probability from which a detection counts
SLACK = 1 / 12  # of the image's side: how far outside its cell of the 3 × 3 grid an object's centre may lie
_BATCH = 64


class SceneAgreement:
    """The share of a caption's objects that the detector finds: the right kind, with its centre at the right place.

    Colours, sizes and textures are no classes of the detector and are not looked at. Raises UserError for a detector
    of other classes.
    """

    def __init__(self, detector: Path, device: str = "cpu") -> None:
        self._model, self._device = load_detr(detector).to(device), device
        if self._model.config.num_labels < len(KINDS):
            raise UserError(f"{detector}: has {self._model.config.num_labels} classes; is it a detector of scenes?")

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """images (N, H, W, 3) uint8; prompts in the grammar of scenes, else UserError."""
        specs = [parse_caption(prompt) for prompt in prompts]
        shares: list[float] = []
        for at in range(0, len(images), _BATCH):
            chunk = torch.tensor(images[at : at + _BATCH], device=self._device)
            sizes = [images.shape[1:3]] * len(chunk)
            found = detections(self._model(normalise_images(chunk)), sizes, THRESHOLD)
            shares += [
                share_found(spec.objects, each, images.shape[1:3]) for spec, each in zip(specs[at : at + _BATCH], found)
            ]
        return shares


def share_found(objects: Sequence[ObjectSpec], found: Detections, size: tuple[int, int]) -> float:
    """Each detection counts for one object. A caption without objects is met by a picture without detections."""
    height, width = size
    labels = found.labels.tolist()
    left = {i for i, label in enumerate(labels) if label < len(KINDS)}
    if not objects:
        return float(not left)
    centres = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2 / found.boxes.new_tensor([width, height])).tolist()
    hits = 0
    for thing in objects:
        row, column = divmod(thing.place, 3)
        for i in sorted(left):
            x, y = centres[i]
            if labels[i] == thing.label and _near(x, column) and _near(y, row):
                left.remove(i)
                hits += 1
                break
    return hits / len(objects)


def _near(position: float, cell: int) -> bool:
    return cell / 3 - SLACK <= position <= (cell + 1) / 3 + SLACK
