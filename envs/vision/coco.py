"""Any folder in COCO's layout: instances (boxes) or panoptic segments, and captions where there are some.

What is wrong with a file or a record is named. By configuration it is refused, or the record is left out and counted.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from envs.vision.coco_files import MALFORMED, decode_mask, open_image, read_annotations, shown
from envs.vision.example import Example, TrueSegments, true_segments
from models.errors import UserError

log = logging.getLogger(__name__)

TOLD = 3  # of the records left out, in the log
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
    names: list[str] = field(default_factory=list)  # of the objects, for messages
    crowds: list[tuple[Any, int]] = field(default_factory=list)  # shape and label of each
    annotations: list[dict[str, Any]] = field(default_factory=list)  # of its objects and crowds, for COCO's evaluation
    segments: Path | None = None  # the panoptic PNG
    captions: list[str] = field(default_factory=list)


class CocoFolder:
    """An indexable source of examples.

    names: of the labels 0 to n-1, in the order of COCO's numbers; category_ids: those numbers. stuff: labels that are
    no things. problems: one line for each record left out; the log tells of the first.

    Raises UserError for a missing or broken annotation file, and with `on_bad="refuse"` for the first bad record.
    """

    def __init__(self, config: CocoConfig) -> None:
        self.config = config
        self.problems: list[str] = []
        kind = "panoptic" if config.panoptic else "instances"
        self.file = config.folder / "annotations" / f"{kind}_{config.split}.json"
        dataset = read_annotations(self.file, ("images", "annotations", "categories"))
        ordered = self._categories(dataset["categories"])
        self.category_ids = [number for number, _, _ in ordered]
        self.names = tuple(name for _, name, _ in ordered)
        self.stuff = frozenset(i for i, (_, _, is_thing) in enumerate(ordered) if not is_thing)
        self._label_of = {category: label for label, category in enumerate(self.category_ids)}
        records = self._images(dataset["images"])
        for annotation in dataset["annotations"]:
            try:
                if config.panoptic:
                    self._add_panoptic(records, annotation)
                else:
                    self._add_instance(records, annotation)
            except MALFORMED as error:
                self._unusable("annotation", annotation, error)
        self._add_captions(records)
        if self.problems:
            shown = "; ".join(self.problems[:TOLD])
            log.warning("%s: %d records left out: %s", self.file, len(self.problems), shown)
        self.records = list(records.values())
        if not self.records:
            raise UserError(
                f"{self.file}: no usable image; {self.problems[0] if self.problems else 'the list is empty'}"
            )

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, masks: bool = True) -> Example:
        """Open image `index`, and its masks if they are wanted. Raises UserError if its file cannot be read, or a mask
        not decoded: that shows only here."""
        record = self.records[index]
        image = open_image(record.path, (record.height, record.width), self.file.name)
        labels = np.array(record.labels, np.int64)
        boxes = np.array(record.boxes, np.float32).reshape(-1, 4)
        return Example(image, labels, boxes, self._ids(record) if masks else None)

    def readable(self, index: int, among: Sequence[int] | None = None, masks: bool = True) -> tuple[int, Example]:
        """The number of record `index` (of those in `among`, if given), and its example. With `on_bad="skip"` the next
        one whose files can be read stands in for one whose cannot, which is named in the log.

        Raises UserError if it may not be skipped, or none is left.
        """
        numbers = range(len(self)) if among is None else among
        for i in range(len(numbers)):
            number = numbers[(index + i) % len(numbers)]
            try:
                return number, self.example(number, masks)
            except UserError as error:
                if self.config.on_bad == "refuse":
                    raise
                log.warning("left out: %s", error)
        raise UserError(f"{self.file}: none of {len(numbers)} images can be read")

    def _bad(self, problem: str, file: Path | None = None) -> None:
        if self.config.on_bad == "refuse":
            raise UserError(
                f"{file or self.file}: {problem}; mend it, or set --data.coco.on-bad skip to leave such records out"
            )
        self.problems.append(f"{file.name}: {problem}" if file else problem)

    def _unusable(self, kind: str, record: Any, error: Exception, file: Path | None = None) -> None:
        self._bad(f"{kind} {shown(record)} cannot be used ({type(error).__name__}: {error})", file)

    def _categories(self, categories: Sequence[Any]) -> list[tuple[int, str, bool]]:
        """Number, name and whether it is a thing, in the order of the numbers."""
        usable: dict[int, tuple[int, str, bool]] = {}
        for category in categories:
            try:
                number = int(category["id"])
                if number in usable:
                    raise ValueError(f"{number} is {usable[number][1]} already")
                usable[number] = number, str(category["name"]), bool(category.get("isthing", 1))
            except MALFORMED as error:
                self._unusable("category", category, error)
        return sorted(usable.values())

    def _images(self, images: Sequence[Any]) -> dict[int, Record]:
        records: dict[int, Record] = {}
        for image in images:
            try:
                path = self.config.folder / self.config.split / image["file_name"]
                record = Record(image["id"], path, int(image["height"]), int(image["width"]))
                if path.is_file():
                    records[record.id] = record
                else:
                    self._bad(f"image {record.id}: {path} is missing")
            except MALFORMED as error:
                self._unusable("image", image, error)
        return records

    def _add_instance(self, records: Mapping[int, Record], annotation: Mapping[str, Any]) -> None:
        record = records.get(annotation["image_id"])
        if record is not None:
            # An empty segmentation is how folders that have boxes alone say so.
            self._add(record, annotation, f"annotation {annotation['id']}", annotation.get("segmentation") or None)

    def _add_panoptic(self, records: dict[int, Record], annotation: Mapping[str, Any]) -> None:
        record = records.get(annotation["image_id"])
        if record is None:
            return
        try:
            segments = list(annotation["segments_info"])
            record.segments = self.file.with_suffix("") / annotation["file_name"]
        except MALFORMED:
            del records[record.id]  # an image of which nothing is known is none without objects
            raise
        if not record.segments.is_file():
            self._bad(f"image {record.id}: its segments {record.segments} are missing")
            del records[record.id]
            return
        for segment in segments:
            try:
                self._add(record, segment, f"image {record.id}, segment {segment['id']}", int(segment["id"]))
            except MALFORMED as error:
                self._unusable(f"image {record.id}, segment", segment, error)

    def _add(self, record: Record, annotation: Mapping[str, Any], name: str, shape: Any) -> None:
        label = self._label_of.get(annotation["category_id"])
        if label is None:
            self._bad(f"{name}: category {annotation['category_id']} is not among the categories")
            return
        x, y, w, h = annotation["bbox"]
        right, below = x + w, y + h
        if not all(map(math.isfinite, (x, y, right, below))):
            self._bad(f"{name}: box {[x, y, w, h]} is not finite")
            return
        if min(x, y) < -OVERSHOOT or right > record.width + OVERSHOOT or below > record.height + OVERSHOOT:
            self._bad(f"{name}: box {[x, y, w, h]} lies outside its image of {record.width}×{record.height}")
            return
        box = [max(x, 0), max(y, 0), min(right, record.width), min(below, record.height)]
        if box[2] <= box[0] or box[3] <= box[1]:
            self._bad(f"{name}: box {[x, y, w, h]} has no area")
            return
        crowd = int(bool(annotation.get("iscrowd", 0)))
        if label not in self.stuff:
            record.annotations.append(
                {
                    "category_id": annotation["category_id"],
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "area": float(w * h if annotation.get("area") is None else annotation["area"]),
                    "iscrowd": crowd,
                }
            )
        if crowd:  # no object to find, but no mistake either
            record.crowds.append((shape, label))
            return
        record.labels.append(label)
        record.boxes.append([float(v) for v in box])
        record.shapes.append(shape)
        record.names.append(name)

    def _add_captions(self, records: Mapping[int, Record]) -> None:
        file = self.config.folder / "annotations" / f"captions_{self.config.split}.json"
        if not file.is_file():
            return
        for annotation in read_annotations(file, ("annotations",))["annotations"]:
            try:
                record = records.get(annotation["image_id"])
                caption = str(annotation.get("caption", "")).strip()
            except MALFORMED as error:
                self._unusable("caption", annotation, error, file)
                continue
            if record is None:
                continue
            if caption:
                record.captions.append(caption)
            else:
                self._bad(f"caption {annotation.get('id')} of image {record.id} is empty", file)

    def segments(self, index: int, example: Example) -> TrueSegments:
        """Of `example(index)`, with the crowds of a panoptic folder. Raises UserError as that does."""
        record, plain = self.records[index], true_segments(example)
        if record.segments is None or not record.crowds:
            return plain
        numbers, ids, labels = self._segment_numbers(record, record.segments), plain.ids.copy(), dict(plain.labels)
        for i, (segment, label) in enumerate(record.crowds, start=len(labels) + 1):
            ids[numbers == segment] = i
            labels[i] = label
        return TrueSegments(ids, labels, frozenset(labels.keys() - plain.labels.keys()))

    def _segment_numbers(self, record: Record, file: Path) -> np.ndarray:
        colours = open_image(file, (record.height, record.width), self.file.name).astype(np.uint32)
        return colours @ np.array([1, 256, 65536], np.uint32)

    def _ids(self, record: Record) -> np.ndarray | None:
        size = record.height, record.width
        ids = np.zeros(size, np.int16)
        if record.segments is not None:
            numbers = self._segment_numbers(record, record.segments)
            for i, segment in enumerate(record.shapes):
                ids[numbers == segment] = i + 1
            return ids
        if any(shape is None for shape in record.shapes):
            return None
        named = zip(record.shapes, record.names)
        masks = [decode_mask(shape, *size, f"{self.file}: image {record.id}, {name}") for shape, name in named]
        for i in sorted(
            range(len(masks)), key=lambda i: -int(masks[i].sum())
        ):  # of two that overlap, the smaller stays
            ids[masks[i]] = i + 1
        return ids
