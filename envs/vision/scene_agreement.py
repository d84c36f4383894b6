"""Does a picture show what its caption asks for? A detector looks (DETR trained on scenes), and pixels tell colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from envs.vision.loaded_models import shared_scene_detector
from envs.vision.scene_spec import BACKGROUND_COLOURS, COLOURS, KINDS, ObjectSpec, parse_caption
from models.detr.detr import DetrOutput, normalise_images
from models.detr.postprocess import Detections, detections

THRESHOLD = 0.5  # probability from which a detection counts
SLACK = 1 / 12  # of the image's side: how far outside its cell of the 3 × 3 grid an object's centre may lie
LEAST = 0.05  # share of a box that its colour must fill: a small striped star fills more
_BATCH = 64
_PALETTE = np.array([*COLOURS.values(), *BACKGROUND_COLOURS.values()], np.float32)


class SceneDetector:
    """A DETR that knows the kinds of scenes. Raises UserError for a detector of other classes."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._model, self._device = shared_scene_detector(folder, device), device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> list[Detections]:
        """images (N, H, W, 3) uint8 → what is seen in each, on the CPU."""
        found: list[Detections] = []
        for at in range(0, len(images), _BATCH):
            chunk_BHWC = torch.tensor(images[at : at + _BATCH], device=self._device)
            output = self._model(normalise_images(chunk_BHWC), masks=False)
            last = DetrOutput(output.logits_LBQC[-1:].cpu(), output.boxes_LBQ4[-1:].cpu())
            found += detections(last, [images.shape[1:3]] * len(chunk_BHWC), THRESHOLD)
        return found


class SceneAgreement:
    """The share of a caption's objects that a detector finds. Sizes and textures are not looked at."""

    def __init__(self, detector: Path, device: str = "cpu") -> None:
        self._detect = SceneDetector(detector, device)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """images (N, H, W, 3) uint8; prompts in the grammar of scenes, else UserError."""
        specs = [parse_caption(prompt) for prompt in prompts]
        seen = self._detect(images)
        return [share_found(spec.objects, found, image) for spec, found, image in zip(specs, seen, images)]


def share_found(objects: Sequence[ObjectSpec], found: Detections, image: np.ndarray) -> float:
    """The share of the objects that are found in image (H, W, 3) uint8: the right kind, its centre at the right place,
    and its own colour the one that fills most of the box.

    Each detection counts for one object, and those that nobody asked for cost nothing. A caption without objects is met
    by a picture without detections.
    """
    return _count(objects, found, image) / len(objects) if objects else float(not things_in(found))


def share_of_all(objects: Sequence[ObjectSpec], found: Detections, image: np.ndarray) -> float:
    """As `share_found`, but of all things that are seen where these are more than the objects: a picture full of
    everything is no good picture of a few things."""
    seen = things_in(found)
    return _count(objects, found, image) / max(len(objects), seen) if objects else float(not seen)


def things_in(found: Detections) -> int:
    """How many of the detections are no backgrounds."""
    return int((found.labels < len(KINDS)).sum())


def _count(objects: Sequence[ObjectSpec], found: Detections, image: np.ndarray) -> float:
    height, width = image.shape[:2]
    boxes, labels = found.boxes.numpy(), found.labels.tolist()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / np.array([width, height], np.float32)
    fits = np.zeros((len(objects), len(labels)))
    for i, thing in enumerate(objects):
        row, column = divmod(thing.place, 3)
        for j, (x, y) in enumerate(centres):
            there = _near(x, column) and _near(y, row)
            fits[i, j] = there and labels[j] == thing.label and colour_of(image, boxes[j]) == thing.colour
    return float(fits[linear_sum_assignment(fits, maximize=True)].sum())


def colour_of(image: np.ndarray, box: np.ndarray) -> str | None:
    """The object colour that is nearest to most pixels of an xyxy box; None if there is hardly any.

    Backgrounds have colours of their own. The dark stripes and dots of a texture look like some of them, so only an
    object's bright part speaks for it.
    """
    height, width = image.shape[:2]
    left, top = (max(0, int(v)) for v in box[:2])
    right, bottom = (min(side, int(np.ceil(v))) for side, v in zip((width, height), box[2:]))
    pixels_PC = image[top:bottom, left:right].reshape(-1, 3).astype(np.float32)
    if not len(pixels_PC):
        return None
    nearest_P = np.abs(pixels_PC[:, None] - _PALETTE).sum(-1).argmin(1)
    counts = np.bincount(nearest_P, minlength=len(_PALETTE))[: len(COLOURS)]
    most = int(counts.argmax())
    return tuple(COLOURS)[most] if counts[most] >= LEAST * len(pixels_PC) else None


def _near(position: float, cell: int) -> bool:
    return cell / 3 - SLACK <= position <= (cell + 1) / 3 + SLACK
