"""What is in a scene, as data and as a caption, each from the other.

The grammar of captions:

    caption    := objects ", on " background  |  background
    objects    := object  |  object {", " object} " and " object
    object     := "a " [size] [texture] colour thing place
    thing      := "circle" | "square" | "triangle" | "star" | "cross" | "ring" | "handwritten" digit
    size       := "small" | "large"           (neither: medium)
    texture    := "striped" | "dotted"        (neither: solid; digits are always solid)
    place      := "at the top left" | "at the top" | ... | "in the centre" | ...
    background := "a " pattern colour " background"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "dotted")
PATTERNS = ("plain", "graded", "checkered", "striped", "noisy")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (50, 170, 70),
    "blue": (60, 110, 235),
    "purple": (140, 70, 200),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (22, 22, 24),
    "grey": (112, 114, 118),
    "brown": (92, 62, 40),
    "navy": (24, 32, 84),
}
PLACES = (  # row by row, on a grid of three by three
    "at the top left", "at the top", "at the top right",
    "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip

# Classes of a detector on scenes: things, then the backgrounds as stuff.
CATEGORIES = (*KINDS, *(f"{pattern} background" for pattern in PATTERNS))
STUFF = frozenset(range(len(KINDS), len(CATEGORIES)))


@dataclass(frozen=True)
class ObjectSpec:
    """kind: a shape or a digit. place: an index into PLACES, the cell that holds the object's centre."""

    kind: str
    colour: str
    size: str = "medium"
    texture: str = "solid"
    place: int = 4

    def __post_init__(self) -> None:
        for what, value, known in (
            ("kind", self.kind, KINDS),
            ("colour", self.colour, tuple(COLOURS)),
            ("size", self.size, SIZES),
            ("texture", self.texture, TEXTURES),
        ):
            if value not in known:
                raise UserError(f"scene: the {what} {value!r} is not one of {', '.join(known)}")
        if not 0 <= self.place < len(PLACES):
            raise UserError(f"scene: place {self.place} is not one of 0 to {len(PLACES) - 1}")
        if self.kind in DIGITS and self.texture != "solid":
            raise UserError(f"scene: a handwritten {self.kind} is solid, not {self.texture}")

    @property
    def label(self) -> int:
        """Index into CATEGORIES."""
        return KINDS.index(self.kind)

    def phrase(self) -> str:
        size = "" if self.size == "medium" else f"{self.size} "
        texture = "" if self.texture == "solid" else f"{self.texture} "
        thing = f"handwritten {self.kind}" if self.kind in DIGITS else self.kind
        article = "an" if (size + texture + self.colour)[0] in "aeiou" else "a"
        return f"{article} {size}{texture}{self.colour} {thing} {PLACES[self.place]}"


@dataclass(frozen=True)
class SceneSpec:
    objects: tuple[ObjectSpec, ...]
    pattern: str = "plain"
    background: str = "black"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise UserError(f"scene: the pattern {self.pattern!r} is not one of {', '.join(PATTERNS)}")
        if self.background not in BACKGROUND_COLOURS:
            raise UserError(f"scene: the background {self.background!r} is not one of {', '.join(BACKGROUND_COLOURS)}")

    @property
    def background_label(self) -> int:
        """Index into CATEGORIES."""
        return len(KINDS) + PATTERNS.index(self.pattern)

    def caption(self) -> str:
        background = f"a {self.pattern} {self.background} background"
        phrases = [thing.phrase() for thing in self.objects]
        if not phrases:
            return background
        listed = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
        return f"{listed}, on {background}"


_OBJECT = re.compile(
    rf"an? (?:(?P<size>small|large) )?(?:(?P<texture>striped|dotted) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?:handwritten (?P<digit>\d)|(?P<shape>{'|'.join(SHAPES)}))"
    # Longest first: "at the top" begins "at the top left".
    rf"(?: (?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))}))?"
)
_BACKGROUND = re.compile(rf"a (?P<pattern>{'|'.join(PATTERNS)}) (?P<colour>{'|'.join(BACKGROUND_COLOURS)}) background")


def parse_caption(caption: str) -> SceneSpec:
    """The inverse of `SceneSpec.caption`. Raises UserError for text outside the grammar, naming where it leaves it."""
    listed, separator, background = caption.rpartition(", on ")
    found = _BACKGROUND.fullmatch(background)
    if found is None:
        raise UserError(f"caption {caption!r}: does not end in a background such as 'a plain black background'")
    objects = []
    position = 0
    while position < len(listed):
        thing = _OBJECT.match(listed, position)
        if thing is None or not thing["place"]:
            raise UserError(f"caption {caption!r}: not an object with a place: {listed[position:]!r}")
        objects.append(_object(thing.groupdict(), PLACES.index(thing["place"])))
        position = thing.end()
        for joint in (", ", " and "):
            if listed.startswith(joint, position):
                position += len(joint)
                break
    if separator and not objects:
        raise UserError(f"caption {caption!r}: names no object before the background")
    return SceneSpec(tuple(objects), found["pattern"], found["colour"])


def understood(text: str, rng: np.random.Generator) -> SceneSpec:
    """What of any text the grammar can make sense of: its objects, as many as there are places, and its background.

    What it leaves open, an object's place or the background, comes from `rng`.
    """
    objects = []
    for thing in list(_OBJECT.finditer(text))[: len(PLACES)]:
        place = PLACES.index(thing["place"]) if thing["place"] else int(rng.integers(len(PLACES)))
        digits_are_solid = {"texture": None} if thing["digit"] else {}
        objects.append(_object(thing.groupdict() | digits_are_solid, place))
    by_chance = sample_spec(rng, 0, 0)
    found = _BACKGROUND.search(text)
    pattern, background = (found["pattern"], found["colour"]) if found else (by_chance.pattern, by_chance.background)
    return SceneSpec(tuple(objects), pattern, background)


def _object(thing: Mapping[str, Any], place: int) -> ObjectSpec:
    kind, size, texture = thing["digit"] or thing["shape"], thing["size"] or "medium", thing["texture"] or "solid"
    return ObjectSpec(kind, thing["colour"], size, texture, place)


def sample_spec(rng: np.random.Generator, min_objects: int, max_objects: int) -> SceneSpec:
    """Draw everything uniformly. Objects have places of their own as long as there are enough."""
    count = int(rng.integers(min_objects, max_objects + 1))
    places = [int(p) for _ in range(-(-count // len(PLACES))) for p in rng.permutation(len(PLACES))]
    kinds, colours = rng.integers(len(KINDS), size=count), rng.integers(len(COLOURS), size=count)
    sizes, textures = rng.integers(len(SIZES), size=count), rng.integers(len(TEXTURES), size=count)
    names = tuple(COLOURS)
    objects = tuple(
        ObjectSpec(
            KINDS[kinds[i]],
            names[colours[i]],
            SIZES[sizes[i]],
            TEXTURES[textures[i]] if kinds[i] < len(SHAPES) else "solid",
            places[i],
        )
        for i in range(count)
    )
    return SceneSpec(objects, PATTERNS[rng.integers(len(PATTERNS))], tuple(BACKGROUND_COLOURS)[rng.integers(4)])
