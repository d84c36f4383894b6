"""The files of a COCO folder, and the masks that they hold. Whatever is wrong with one is a UserError that names it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from models.errors import UserError

# What PIL raises: SyntaxError for a broken PNG, the last for one of more pixels than anybody means.
UNREADABLE = (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError)
# What reading a record raises if a key is missing, or a value is of another kind.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


def read_annotations(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """What an annotation file holds. Raises UserError if it is missing, broken, or lacks one of the lists `keys`."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: missing; COCO's layout has annotations/instances_SPLIT.json and so on") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file}: has no list {key!r}; is it a COCO annotation file?")
    return content


def shown(record: Any) -> str:
    """A record's number, for a message; what is no record, as it is."""
    return str(record.get("id", record.get("image_id", "?")) if isinstance(record, dict) else record)[:60]


def open_image(path: Path, size: tuple[int, int], said_by: str) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError if it cannot be read, or is not of the size (height, width) that `said_by` says
    it has."""
    try:
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{path}: not an image that can be read ({error}); replace it or remove its record") from None
    if image.shape[:2] != size:
        raise UserError(
            f"{path}: is {image.shape[1]}×{image.shape[0]}, but {said_by} says {size[1]}×{size[0]}; replace it or "
            "mend its record"
        )
    return image


def decode_mask(shape: Any, height: int, width: int, name: str) -> np.ndarray:
    """COCO's polygons, uncompressed or compressed run lengths → (H, W) bool. Raises UserError, naming `name`, for what
    is none of these."""
    try:
        if isinstance(shape, list):
            polygons = [np.asarray(polygon, float) for polygon in shape]
            farthest = 2 * max(height, width)  # pycocotools walks along every edge, however far it leads
            if not all(p.ndim == 1 and len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
                raise ValueError("a polygon is a list of x and y, of at least 3 points")
            if not all((np.abs(p) <= farthest).all() for p in polygons):
                raise ValueError("a polygon lies far outside its image")
            encoded = coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], height, width))
        elif list(shape["size"]) != [height, width]:
            raise ValueError(f"run lengths of size {shape['size']} in an image of {[height, width]}")
        elif isinstance(shape["counts"], list):
            encoded = coco_mask.frPyObjects(shape, height, width)
        else:
            encoded = shape
        return coco_mask.decode(encoded).astype(bool)
    except MALFORMED as error:
        raise UserError(
            f"{name}: its segmentation is no mask ({type(error).__name__}: {error}); mend or remove it"
        ) from None
