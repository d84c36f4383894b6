"""How much of a scene's specification a detector finds in an image: the reward of whoever draws scenes from captions.

An object of the specification is found if a detection has its kind, lies in its place, and shows its colour. Kinds and
places are the detector's word; colours are measured on the pixels of the box, so a detector of kinds alone will do.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from envs.vision.scene_spec import BACKGROUND_COLOURS, COLOURS, KINDS, PLACES, SceneSpec
from models.detr.postprocess import Detections

SLACK = 0.06  # of the image's side, by which a centre may lie outside its place's cell: boxes are of what can be seen


def agreement(spec: SceneSpec, found: Detections, image: np.ndarray) -> float:
    """Share of the specification's objects that are found in image (H, W, 3) uint8; 1 if it asks for none.

    No detection counts twice. Detections that the specification does not ask for cost nothing.
    """
    if not spec.objects:
        return 1.0
    height, width = image.shape[:2]
    boxes, labels = found.boxes.double().cpu().numpy(), found.labels.cpu().numpy()
    colours = [colours_of(image, box) for box in boxes]
    fits = np.zeros((len(spec.objects), len(boxes)))
    for i, thing in enumerate(spec.objects):
        for j, (box, label) in enumerate(zip(boxes, labels)):
            x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
            of_kind = label < len(KINDS) and KINDS[label] == thing.kind
            fits[i, j] = of_kind and thing.place in _places(x, y) and thing.colour in colours[j]
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return float(fits[rows, columns].sum() / len(spec.objects))


def colours_of(image: np.ndarray, box: Sequence[float] | np.ndarray) -> set[str]:
    """The colours that fill a box: those near to at least a seventh of its pixels.

    Each pixel goes to the nearest of all colours, at full brightness and at the 0.45 of a texture's dark stripes and
    dots, and of all backgrounds.
    """
    height, width = image.shape[:2]
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(width, int(np.ceil(box[2]))), min(height, int(np.ceil(box[3])))
    pixels = image[y0:y1, x0:x1].reshape(-1, 3).astype(np.float32)
    if len(pixels) == 0:
        return set()
    names = [*COLOURS, *COLOURS, *(f"background {name}" for name in BACKGROUND_COLOURS)]
    bright = np.array(list(COLOURS.values()), np.float32)
    palette = np.concatenate([bright, 0.45 * bright, np.array(list(BACKGROUND_COLOURS.values()), np.float32)])
    nearest = np.abs(pixels[:, None] - palette).sum(-1).argmin(1)
    counts: dict[str, int] = {}
    for index, count in zip(*np.unique(nearest, return_counts=True)):
        counts[names[index]] = counts.get(names[index], 0) + int(count)
    return {name for name in COLOURS if counts.get(name, 0) >= len(pixels) / 7}


def _places(x: float, y: float) -> set[int]:
    """The places whose cells, widened by SLACK, hold a centre."""
    columns = {int(np.clip((x + d) * 3, 0, 2)) for d in (-SLACK, 0, SLACK)}
    rows = {int(np.clip((y + d) * 3, 0, 2)) for d in (-SLACK, 0, SLACK)}
    return {row * 3 + column for row in rows for column in columns if row * 3 + column < len(PLACES)}
