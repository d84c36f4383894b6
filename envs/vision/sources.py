"""Where labelled images come from: scenes rendered on the fly, or a COCO folder. And the actor that makes batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from envs.vision.coco import CocoConfig, CocoFolder
from envs.vision.coco_format import categories, instance_records
from envs.vision.example import Batch, Example, HeldoutBatch, collate, true_segments
from envs.vision.scene_spec import CATEGORIES, STUFF
from envs.vision.scenes import SceneConfig, Split, make_scene
from envs.vision.transforms import ResizeConfig, flipped, resized
from models.errors import UserError
from models.seeding import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    scenes: SceneConfig = field(default_factory=SceneConfig)
    """Rendered on the fly, unless --data.coco.folder names a COCO folder."""
    coco: CocoConfig = field(default_factory=CocoConfig)
    heldout_split: str = "val2017"
    """Of the COCO folder: what evaluation looks at."""
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    """Of a COCO folder's images; scenes have their size."""


class Source(Protocol):
    """names: of labels 0 to n-1. stuff: labels that are no things. category_ids: COCO's numbers for the labels."""

    names: tuple[str, ...]
    stuff: frozenset[int]
    category_ids: list[int]

    def __len__(self) -> int: ...

    def example(self, index: int, masks: bool = True) -> Example:
        """masks: open them too."""
        ...

    def truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """The things of these images as COCO's evaluation wants them; an image's number is its index."""
        ...


class SceneSource:
    """Scenes, their background as one more object whose class is its pattern."""

    def __init__(self, config: SceneConfig, seed: int, split: Split) -> None:
        self.names, self.stuff, self.category_ids = CATEGORIES, STUFF, [c["id"] for c in categories()]
        self.config, self.seed, self.split = config, seed, split

    def __len__(self) -> int:
        return 2**62  # no end

    def example(self, index: int, masks: bool = True) -> Example:
        scene = make_scene(self.config, self.seed, index, self.split)
        height, width = scene.ids.shape
        labels = np.append(scene.labels, scene.spec.background_label)
        boxes = np.concatenate([scene.boxes, np.array([[0, 0, width, height]], np.float32)])
        ids = np.where(scene.ids == 0, np.int16(len(labels)), scene.ids)
        return Example(scene.image, labels, boxes, ids)

    def truth(self, indices: Sequence[int]) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in indices:
            example = self.example(number)
            things = [i for i, label in enumerate(example.labels.tolist()) if label not in self.stuff]
            first = len(annotations) + 1
            annotations += instance_records(number, example.labels[things], example.boxes[things], None, first)
            images.append({"id": number, "height": example.image.shape[0], "width": example.image.shape[1]})
        return {"images": images, "annotations": annotations, "categories": _things(self)}


class CocoSource:
    def __init__(self, config: CocoConfig) -> None:
        self.folder = CocoFolder(config)
        self.names, self.stuff, self.category_ids = self.folder.names, self.folder.stuff, self.folder.category_ids

    def __len__(self) -> int:
        return len(self.folder)

    def example(self, index: int, masks: bool = True) -> Example:
        return self.folder.example(index, masks)

    def truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """Boxes and areas as the file has them, and its crowds, so that AP is the official one. Opens no image."""
        records = [(i, self.folder.records[i]) for i in indices]
        kept = [{**annotation, "image_id": i} for i, record in records for annotation in record.annotations]
        return {
            "images": [{"id": i, "height": record.height, "width": record.width} for i, record in records],
            "annotations": [{**annotation, "id": number} for number, annotation in enumerate(kept, start=1)],
            "categories": _things(self),
        }


def _things(source: Source) -> list[dict[str, Any]]:
    things = [i for i in range(len(source.names)) if i not in source.stuff]
    return [{"id": source.category_ids[i], "name": source.names[i]} for i in things]


def make_source(config: DataConfig, seed: int, heldout: bool) -> Source:
    """Raises UserError as CocoFolder does."""
    if config.coco.folder.parts:
        split = config.heldout_split if heldout else config.coco.split
        return CocoSource(CocoConfig(config.coco.folder, split, config.coco.panoptic, config.coco.on_bad))
    return SceneSource(config.scenes, seed, "heldout" if heldout else "train")


class BatchLoader:
    """An actor that makes batches of a source. A batch depends on the seed and its number alone."""

    def __init__(self, config: DataConfig, seed: int, batch_size: int, masks: bool) -> None:
        self.config, self.seed, self.batch_size, self.masks = config, seed, batch_size, masks
        self.sources: dict[bool, Source] = {}
        self.order: tuple[int, np.ndarray] | None = None  # of the latest epoch

    def source(self, heldout: bool) -> Source:
        if heldout not in self.sources:
            self.sources[heldout] = make_source(self.config, self.seed, heldout)
        return self.sources[heldout]

    def train_batch(self, number: int) -> Batch:
        """Scenes never repeat; the images of a folder come in a new order each epoch, flipped and resized at random."""
        source = self.source(heldout=False)
        indices = [self._index(len(source), i) for i in range(number * self.batch_size, (number + 1) * self.batch_size)]
        if isinstance(source, CocoSource):
            examples = [source.folder.readable(i, masks=self.masks)[1] for i in indices]
            rng = np.random.default_rng(derive_seed(self.seed, "augmentation", number))
            return self._collate([resized(flipped(e, rng), self.config.resize, rng) for e in examples])
        return self._collate([source.example(i) for i in indices])

    def heldout_batch(self, first: int, count: int) -> HeldoutBatch:
        """Images `first` to `first + count - 1`. Of a folder, with `on_bad="skip"`, without those that cannot be
        read, which are named in the log; otherwise UserError."""
        source = self.source(heldout=True)
        numbers: list[int] = []
        examples: list[Example] = []
        for number in range(first, first + count):
            try:
                examples.append(source.example(number, self.masks))
                numbers.append(number)
            except UserError as error:
                if self.config.coco.on_bad == "refuse":
                    raise
                log.warning("left out: %s", error)
        if not examples:
            return HeldoutBatch([], None)
        if not isinstance(source, CocoSource):
            return HeldoutBatch(numbers, self._collate(examples), [true_segments(e) for e in examples if self.masks])
        batch = self._collate([resized(e, self.config.resize, None) for e in examples])
        pairs = zip(numbers, examples) if self.masks else ()
        return HeldoutBatch(numbers, batch, [source.folder.segments(number, e) for number, e in pairs])

    def _collate(self, examples: list[Example]) -> Batch:
        if not self.masks:
            examples = [Example(e.image, e.labels, e.boxes) for e in examples]
        elif any(e.ids is None for e in examples):
            raise UserError(
                "objects without masks cannot train a mask head: give --data.coco.panoptic, or a detector without masks"
            )
        return collate(examples)

    def _index(self, length: int, position: int) -> int:
        if isinstance(self.source(heldout=False), SceneSource):
            return position
        epoch, place = divmod(position, length)
        if self.order is None or self.order[0] != epoch:
            rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            self.order = (epoch, rng.permutation(length))
        return int(self.order[1][place])
