"""Captioned scenes: coloured shapes and handwritten digits on a background, with boxes and masks, repeatable by seed.

    scene = make_scene(SceneConfig(), seed=0, index=7)
    scene.image, scene.caption, scene.boxes, scene.masks

One scene of 128 pixels takes about a millisecond. Scenes of the split "heldout" share neither seeds nor handwriting
with those of "train".
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.vision.scene_spec import BACKGROUND_COLOURS, COLOURS, DIGITS, SceneSpec, sample_spec
from envs.vision.shapes import coverage, handwriting, written
from models.errors import UserError
from models.seeding import derive_seed

Split = Literal["train", "heldout"]
RADII = {"small": (0.09, 0.11), "medium": (0.13, 0.165), "large": (0.2, 0.25)}  # as parts of the image's side
TRIES = 20  # of finding a place that is not too near to others
NEAREST = 0.6  # distance of two centres over the sum of their radii: nearer ones hide too much of each other


@dataclass(frozen=True)
class SceneConfig:
    size: int = 128
    """Pixels of a side."""
    min_objects: int = 1
    max_objects: int = 5
    object_scale: float = 1.0
    """Of the objects' usual part of the image: 0.25 on four times the side makes objects of as many pixels."""

    def __post_init__(self) -> None:
        if self.size < 32:
            raise UserError(f"scenes: size is {self.size}: must be at least 32 pixels")
        if not 0 <= self.min_objects <= self.max_objects <= 254:
            raise UserError(
                f"scenes: min_objects {self.min_objects} and max_objects {self.max_objects}: "
                "must be in order, from 0 to 254"
            )
        if not 0 < self.object_scale <= 1 or self.size * self.object_scale < 32:
            raise UserError(
                f"scenes: object_scale {self.object_scale}: objects need at least 1/32 of 32 pixels to show"
            )


@dataclass(frozen=True)
class Scene:
    """Object i of n is what `spec.objects[i]` asks for. Boxes and masks are of what can be seen of it."""

    image: np.ndarray  # (H, W, 3) uint8
    spec: SceneSpec
    labels: np.ndarray  # (n,) int64, indices into CATEGORIES
    boxes: np.ndarray  # (n, 4) float32, xyxy in pixels
    ids: np.ndarray  # (H, W) uint8: i + 1 where object i is seen, 0 for the background

    @property
    def caption(self) -> str:
        return self.spec.caption()

    @property
    def masks(self) -> np.ndarray:
        """(n, H, W) bool."""
        return self.ids == np.arange(1, len(self.labels) + 1, dtype=np.uint8)[:, None, None]


def make_scene(config: SceneConfig, seed: int, index: int, split: Split = "train") -> Scene:
    """Scene number `index` of a seed and a split: the same on every machine, whatever was made before it."""
    spec, rng = _specified(config, seed, index, split)
    return render(spec, rng, config, split)


def scene_caption(config: SceneConfig, seed: int, index: int, split: Split = "train") -> str:
    """The caption of `make_scene` with the same arguments, at a fraction of the time: nothing is drawn."""
    return _specified(config, seed, index, split)[0].caption()


def _specified(config: SceneConfig, seed: int, index: int, split: Split) -> tuple[SceneSpec, np.random.Generator]:
    rng = np.random.default_rng(derive_seed(seed, "scene", split, index))
    return sample_spec(rng, config.min_objects, config.max_objects), rng


def captioned_images(
    config: SceneConfig, seed: int, first: int = 0, split: Split = "train"
) -> Iterator[tuple[np.ndarray, str]]:
    """Images (H, W, 3) uint8 with their captions, without end."""
    while True:
        scene = make_scene(config, seed, first, split)
        yield scene.image, scene.caption
        first += 1


def render(spec: SceneSpec, rng: np.random.Generator, config: SceneConfig, split: Split = "train") -> Scene:
    """Draw a specification; what it leaves open (exact place, angle, shade, handwriting) comes from `rng`."""
    canvas = _background(spec, rng, config.size)
    circles = _layout(spec, rng, config)
    ids = np.zeros((config.size, config.size), np.uint8)
    for i in sorted(range(len(circles)), key=lambda i: -circles[i][2]):  # small ones on top, where they stay visible
        _paint(canvas, ids, i, spec, circles[i], rng, split)
    grain = rng.integers(-4, 5, canvas.shape, np.int8)
    image = np.clip(canvas + grain, 0, 255).astype(np.uint8)
    labels = np.array([thing.label for thing in spec.objects], np.int64)
    return Scene(image, spec, labels, _boxes(ids, len(labels)), ids)


def _layout(spec: SceneSpec, rng: np.random.Generator, config: SceneConfig) -> list[tuple[float, float, float]]:
    """Centre x, y and radius of each object in pixels, wholly within the image, centre within its place's cell."""
    cell = config.size / 3
    placed: list[tuple[float, float, float]] = []
    for thing in spec.objects:
        low, high = RADII[thing.size]
        radius = float(rng.uniform(low, high)) * config.size * config.object_scale
        row, column = divmod(thing.place, 3)
        best, clearance = (0.0, 0.0, radius), -math.inf
        for x, y in rng.uniform(0.05, 0.95, (TRIES, 2)):
            centre = [
                min(max((at + along) * cell, radius + 1), config.size - radius - 1)
                for at, along in ((column, x), (row, y))
            ]
            near = min(
                (math.hypot(centre[0] - a, centre[1] - b) / (radius + r) for a, b, r in placed), default=math.inf
            )
            if near > clearance:
                best, clearance = (centre[0], centre[1], radius), near
            if near >= NEAREST:
                break
        placed.append(best)
    return placed


def _paint(
    canvas: np.ndarray,
    ids: np.ndarray,
    i: int,
    spec: SceneSpec,
    circle: tuple[float, float, float],
    rng: np.random.Generator,
    split: Split,
) -> None:
    thing, (x, y, radius) = spec.objects[i], circle
    column, row = round(x), round(y)
    reach = math.ceil(radius) + 2
    pixels = 2 * reach + 1
    if thing.kind in DIGITS:
        examples = handwriting(thing.kind, split == "heldout")
        alpha = written(examples[rng.integers(len(examples))], radius, pixels)
    else:
        angle = rng.uniform(-math.pi, math.pi) if thing.kind == "star" else rng.uniform(-0.3, 0.3)
        alpha = coverage(thing.kind, radius, angle, (x - column, y - row), pixels)
    # The part of the patch that lies on the canvas.
    top, left = max(0, row - reach), max(0, column - reach)
    bottom, right = min(len(ids), row + reach + 1), min(len(ids), column + reach + 1)
    inside = np.s_[top - row + reach : bottom - row + reach, left - column + reach : right - column + reach]
    alpha = alpha[inside]
    colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    fill = colour * _texture(thing.texture, radius, pixels, rng)[inside][..., None]
    target = canvas[top:bottom, left:right]
    target += alpha[..., None] * (fill - target)
    ids[top:bottom, left:right][alpha >= 0.5] = i + 1


def _texture(texture: str, radius: float, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Brightness (pixels, pixels) in [0.45, 1]."""
    if texture == "solid":
        return np.ones((pixels, pixels), np.float32)
    at = np.arange(pixels, dtype=np.float32)
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    period = np.float32(2 * math.pi / max(4.0, 0.5 * radius))
    waves = np.sin(period * (at[None] * cos + at[:, None] * sin) + np.float32(phase))
    if texture == "striped":
        return np.where(waves > 0, np.float32(1), np.float32(0.45))
    across = np.sin(period * (at[:, None] * cos - at[None] * sin))
    return np.where(waves * across > 0.3, np.float32(0.45), np.float32(1))


def _background(spec: SceneSpec, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32."""
    colour = np.array(BACKGROUND_COLOURS[spec.background], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    at = np.arange(size, dtype=np.float32)
    period = float(rng.uniform(0.08, 0.16)) * size
    light: np.ndarray
    match spec.pattern:
        case "plain":
            light = np.zeros((size, size), np.float32)
        case "graded":
            angle = rng.uniform(0, 2 * math.pi)
            slope = (at[None] * math.cos(angle) + at[:, None] * math.sin(angle)) / size
            light = 60 * (slope - slope.mean())
        case "checkered":
            parity = (at // period).astype(np.int8) & 1
            light = 30 * (parity[None] ^ parity[:, None]) - 15
        case "striped":
            angle = rng.uniform(0, math.pi)
            light = 15 * np.sign(
                np.sin((at[None] * math.cos(angle) + at[:, None] * math.sin(angle)) * math.pi / period)
            )
        case _:  # noisy: grains of two pixels
            grains = rng.integers(-28, 29, (-(-size // 2), -(-size // 2)), np.int8)
            light = grains.repeat(2, 0).repeat(2, 1)[:size, :size]
    return colour + light.astype(np.float32)[..., None]


def _boxes(ids: np.ndarray, count: int) -> np.ndarray:
    """xyxy (count, 4) around what is seen of each object."""
    boxes = np.zeros((count, 4), np.float32)
    for i in range(count):
        seen = ids == i + 1
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        if len(rows):
            boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
