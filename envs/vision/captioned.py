"""Images with captions, square and of one size: what a text-to-image model is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from PIL import Image

from envs.vision.coco import CocoConfig, CocoFolder
from envs.vision.scenes import SceneConfig, Split, make_scene
from models.errors import UserError


@dataclass(frozen=True)
class CaptionedConfig:
    scenes: SceneConfig = field(default_factory=lambda: SceneConfig(size=64, max_objects=3))
    """Rendered, unless --data.coco.folder names a COCO folder; their size is that of all images."""
    coco: CocoConfig = field(default_factory=CocoConfig)
    heldout_split: str = "val2017"
    """Of the COCO folder: what evaluation looks at."""
    images: int = 20_000
    """To train on, kept in the memory of the device; at most as many as the folder has."""
    heldout_images: int = 256

    def __post_init__(self) -> None:
        for name in ("images", "heldout_images"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name.replace('_', '-')} is {getattr(self, name)}: must be positive")

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.scenes.size


class CaptionedSource(Protocol):
    """Any source of captioned images. An example depends on its index alone."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> tuple[np.ndarray, str]:
        """Image (H, W, 3) uint8 and its caption."""
        ...


class CaptionedScenes:
    """Scenes without end, one caption each."""

    def __init__(self, config: SceneConfig, seed: int, split: Split) -> None:
        self._settings = config, seed, split

    def __len__(self) -> int:
        return 2**62

    def example(self, index: int) -> tuple[np.ndarray, str]:
        config, seed, split = self._settings
        scene = make_scene(config, seed, index, split)
        return scene.image, scene.caption


class CaptionedCoco:
    """The images of a COCO folder that have a caption, with their first one; scaled and cropped to a square."""

    def __init__(self, config: CocoConfig, size: int) -> None:
        self._folder, self._size = CocoFolder(config), size
        self._indices = [i for i, record in enumerate(self._folder.records) if record.captions]
        if not self._indices:
            raise UserError(f"{config.folder}/annotations/captions_{config.split}.json: no image has a caption")

    def __len__(self) -> int:
        return len(self._indices)

    def example(self, index: int) -> tuple[np.ndarray, str]:
        number, example = self._folder.readable(index, self._indices, masks=False)
        image = Image.fromarray(example.image)
        scale = self._size / min(image.size)
        width, height = (max(self._size, round(side * scale)) for side in image.size)
        left, top = (width - self._size) // 2, (height - self._size) // 2
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        square = image.crop((left, top, left + self._size, top + self._size))
        return np.asarray(square), self._folder.records[number].captions[0]


def make_captioned(config: CaptionedConfig, seed: int, heldout: bool) -> CaptionedSource:
    """Raises UserError as CocoFolder does, and for a COCO folder without captions."""
    if config.coco.folder.parts:
        split = config.heldout_split if heldout else config.coco.split
        return CaptionedCoco(replace(config.coco, split=split), config.size)
    return CaptionedScenes(config.scenes, seed, "heldout" if heldout else "train")


class CaptionedLoader:
    """An actor that renders or reads images."""

    def __init__(self, config: CaptionedConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._sources: dict[bool, CaptionedSource] = {}

    def count(self, heldout: bool) -> int:
        """How many images there are to be had, of those asked for."""
        wanted = self._config.heldout_images if heldout else self._config.images
        return min(wanted, len(self._source(heldout)))

    def load(self, heldout: bool, first: int, count: int) -> tuple[np.ndarray, Sequence[str]]:
        """Images (N, H, W, 3) uint8 and their captions. Raises UserError for a file that cannot be read."""
        examples = [self._source(heldout).example(i) for i in range(first, first + count)]
        return np.stack([image for image, _ in examples]), [caption for _, caption in examples]

    def _source(self, heldout: bool) -> CaptionedSource:
        if heldout not in self._sources:
            self._sources[heldout] = make_captioned(self._config, self._seed, heldout)
        return self._sources[heldout]
