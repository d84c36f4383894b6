"""Any folder in COCO's layout: instances (boxes) or panoptic segments, and captions where there are some.

What is wrong with a file or a record is named. By configuration it is refused, or the record is left out and counted.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from envs.vision.example import Example
from models.errors import UserError

log = logging.getLogger(__name__)

OVERSHOOT = 1.0  # pixels by which a box may exceed its image: COCO's own do, by rounding


@dataclass(frozen=True)
class CocoConfig:
    folder: Path = Path()
    """Folder with annotations/ and one folder of images a split."""
    split: str = "train2017"
    """Images in FOLDER/SPLIT, annotations in FOLDER/annotations/instances_SPLIT.json."""
    panoptic: bool = False
    """Read panoptic_SPLIT.json and its PNGs: masks, stuff too."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """A missing image, a box outside its image or without area, an empty caption: refuse the folder, or leave the
    record out. A broken image shows when it is opened: end the training, or train on the next one instead."""


@dataclass
class Record:
    """One image of the folder, before it is opened."""

    id: int
    path: Path
    height: int
    width: int
    labels: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)  # xyxy
    shapes: list[Any] = field(default_factory=list)  # segment id (panoptic), or COCO's segmentation, or None
    segments: Path | None = None  # the panoptic PNG
    captions: list[str] = field(default_factory=list)


class CocoFolder:
    """An indexable source of examples.

    names: of the labels 0 to n-1, in the order of COCO's numbers; category_ids: those numbers. stuff: labels that are
    no things. problems: one line for each record left out.

    Raises UserError for a missing or broken annotation file, and with `on_bad="refuse"` for the first bad record.
    """

    def __init__(self, config: CocoConfig) -> None:
        self.config = config
        self.problems: list[str] = []
        kind = "panoptic" if config.panoptic else "instances"
        self.file = config.folder / "annotations" / f"{kind}_{config.split}.json"
        self.dataset = _read(self.file, ("images", "annotations", "categories"))
        ordered = sorted(self.dataset["categories"], key=lambda c: c["id"])
        self.category_ids = [int(c["id"]) for c in ordered]
        self.names = tuple(str(c["name"]) for c in ordered)
        self.stuff = frozenset(i for i, c in enumerate(ordered) if c.get("isthing", 1) == 0)
        self._label_of = {category: label for label, category in enumerate(self.category_ids)}
        records = self._images()
        for annotation in self.dataset["annotations"]:
            try:
                if config.panoptic:
                    self._add_panoptic(records, annotation)
                else:
                    self._add_instance(records, annotation)
            except (KeyError, TypeError, ValueError) as error:  # a key that is missing, a value of another kind
                self._bad(f"annotation {_shown(annotation)} cannot be used ({type(error).__name__}: {error})")
        self._add_captions(records)
        self.records = list(records.values())
        if not self.records:
            raise UserError(
                f"{self.file}: no usable image; {self.problems[0] if self.problems else 'the list is empty'}"
            )

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int) -> Example:
        """Open image `index`. Raises UserError if its file cannot be read: that shows only here."""
        record = self.records[index]
        image = _open_image(record.path)
        if image.shape[:2] != (record.height, record.width):
            raise UserError(
                f"{record.path}: is {image.shape[1]}×{image.shape[0]}, but {self.file.name} says "
                f"{record.width}×{record.height}"
            )
        labels = np.array(record.labels, np.int64)
        boxes = np.array(record.boxes, np.float32).reshape(-1, 4)
        return Example(image, labels, boxes, self._ids(record))

    def readable(self, index: int, among: Sequence[int] | None = None) -> tuple[int, Example]:
        """The number of record `index` (of those in `among`, if given), and its example. With `on_bad="skip"` the next
        one whose files can be read stands in for one whose cannot, which is named in the log.

        Raises UserError if it may not be skipped, or none is left.
        """
        numbers = range(len(self)) if among is None else among
        for i in range(len(numbers)):
            number = numbers[(index + i) % len(numbers)]
            try:
                return number, self.example(number)
            except UserError as error:
                if self.config.on_bad == "refuse":
                    raise
                log.warning("left out: %s", error)
        raise UserError(f"{self.file}: none of {len(numbers)} images can be read")

    def _bad(self, problem: str) -> None:
        if self.config.on_bad == "refuse":
            raise UserError(
                f"{self.file}: {problem}; mend it, or set --data.coco.on-bad skip to leave such records out"
            )
        self.problems.append(problem)

    def _images(self) -> dict[int, Record]:
        records: dict[int, Record] = {}
        for image in self.dataset["images"]:
            try:
                path = self.config.folder / self.config.split / image["file_name"]
                record = Record(image["id"], path, image["height"], image["width"])
            except (KeyError, TypeError) as error:
                self._bad(f"image {_shown(image)} cannot be used ({type(error).__name__}: {error})")
                continue
            if path.is_file():
                records[record.id] = record
            else:
                self._bad(f"image {record.id}: {path} is missing")
        return records

    def _add_instance(self, records: Mapping[int, Record], annotation: Mapping[str, Any]) -> None:
        record = records.get(annotation["image_id"])
        if record is None or annotation.get("iscrowd", 0):  # a crowd is no object to find; evaluation knows of it
            return
        self._add(record, annotation, f"annotation {annotation['id']}", annotation.get("segmentation"))

    def _add_panoptic(self, records: dict[int, Record], annotation: Mapping[str, Any]) -> None:
        record = records.get(annotation["image_id"])
        if record is None:
            return
        record.segments = self.file.with_suffix("") / annotation["file_name"]
        if not record.segments.is_file():
            self._bad(f"image {record.id}: its segments {record.segments} are missing")
            del records[record.id]
            return
        for segment in annotation["segments_info"]:
            if not segment.get("iscrowd", 0):
                self._add(record, segment, f"image {record.id}, segment {segment['id']}", segment["id"])

    def _add(self, record: Record, annotation: Mapping[str, Any], name: str, shape: Any) -> None:
        label = self._label_of.get(annotation["category_id"])
        if label is None:
            self._bad(f"{name}: category {annotation['category_id']} is not among the categories")
            return
        x, y, w, h = annotation["bbox"]
        right, below = x + w, y + h
        if min(x, y) < -OVERSHOOT or right > record.width + OVERSHOOT or below > record.height + OVERSHOOT:
            self._bad(f"{name}: box {[x, y, w, h]} lies outside its image of {record.width}×{record.height}")
            return
        box = [max(x, 0), max(y, 0), min(right, record.width), min(below, record.height)]
        if box[2] <= box[0] or box[3] <= box[1]:
            self._bad(f"{name}: box {[x, y, w, h]} has no area")
            return
        record.labels.append(label)
        record.boxes.append([float(v) for v in box])
        record.shapes.append(shape)

    def _add_captions(self, records: Mapping[int, Record]) -> None:
        file = self.config.folder / "annotations" / f"captions_{self.config.split}.json"
        if not file.is_file():
            return
        for annotation in _read(file, ("annotations",))["annotations"]:
            record = records.get(annotation["image_id"])
            if record is None:
                continue
            caption = str(annotation.get("caption", "")).strip()
            if caption:
                record.captions.append(caption)
            else:
                self._bad(f"caption {annotation.get('id')} of image {record.id} is empty")

    def _ids(self, record: Record) -> np.ndarray | None:
        if record.segments is not None:
            colours = _open_image(record.segments).astype(np.uint32)
            numbers = colours @ np.array([1, 256, 65536], np.uint32)
            ids = np.zeros(numbers.shape, np.int16)
            for i, segment in enumerate(record.shapes):
                ids[numbers == segment] = i + 1
            return ids
        if any(shape is None for shape in record.shapes):
            return None
        ids = np.zeros((record.height, record.width), np.int16)
        masks = [_decode(shape, record.height, record.width) for shape in record.shapes]
        for i in sorted(
            range(len(masks)), key=lambda i: -int(masks[i].sum())
        ):  # of two that overlap, the smaller stays
            ids[masks[i]] = i + 1
        return ids


def _shown(record: Any) -> str:
    return str(record.get("id", record.get("image_id", "?")) if isinstance(record, dict) else record)[:60]


def _decode(shape: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons, uncompressed or compressed run lengths → (H, W) bool."""
    if isinstance(shape, list):
        encoded = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        encoded = coco_mask.frPyObjects(shape, height, width)
    else:
        encoded = shape
    return coco_mask.decode(encoded).astype(bool)


def _read(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
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


def _open_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise UserError(f"{path}: not an image that can be read ({error}); replace it or remove its record") from None
