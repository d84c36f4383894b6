"""PromptScene: the policy reads what a scene holds, and writes a prompt; a diffusion model draws it, a detector checks.

    problem    Write a prompt that draws this scene.
               ground colour=grey pattern=checkered
               x=1 y=3 kind=circle size=3 texture=striped colour=red
               x=2 y=2 kind=7 size=2 texture=solid colour=blue
    solution   a large striped red circle at the bottom left and a blue handwritten 7 in the centre, on a checkered grey
               background
    reward     share of the objects that are seen in the picture, or of what is seen if that is more
               (envs/reasoning/scene_judge.py)

x and y count from 1 at the top left, sizes from 1 to 3: no two words of the solution stand side by side in the problem.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np

from envs.reasoning.problem import Problem
from envs.vision.scene_spec import PLACES, SIZES, ObjectSpec, SceneSpec, sample_spec
from envs.vision.shipped_weights import scenes_model
from models.errors import UserError, unknown_name
from models.seeding import derive_seed

VERIFIER = "scene"
_PLACE = re.compile(f" (?:{'|'.join(sorted(PLACES, key=len, reverse=True))})")


@dataclass(frozen=True)
class SceneJudgeConfig:
    """Who draws the prompts of `scene:prompt` and looks at the pictures."""

    drawer: Literal["diffusion", "renderer"] = "diffusion"
    """renderer: no models; a program draws the phrases it understands and tells what it drew. For small machines."""
    diffusion: Path | None = None
    """Stable Diffusion folder. None: the one that comes with the package."""
    detector: Path | None = None
    """DETR trained on scenes. None: the one that comes with the package."""
    steps: int = 20
    """Of the sampler, DPM-Solver++."""
    guidance: float = 4.0
    batch_size: int = 128
    """Completions that are drawn and looked at together."""
    workers: int = 1
    gpu_share: float = 0.1
    """Share of a GPU that Ray accounts to each worker."""
    timeout_s: float = 120.0
    """A batch that takes longer ends its worker, and is given to the next one once."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "workers", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"--scene.{name.replace('_', '-')} is {getattr(self, name)}: must be positive")

    def folders(self) -> tuple[Path, Path]:
        """Of the two models. Raises UserError if one is not there."""
        diffusion = scenes_model("diffusion", self.diffusion, "--scene.diffusion")
        return diffusion, scenes_model("detr", self.detector, "--scene.detector")


@dataclass(frozen=True)
class ScenePrompts:
    """The source `scene:prompt?max_objects=2&careless=0.5`."""

    min_objects: int = 1
    max_objects: int = 2
    careless: float = 0.0  # share of the worked solutions that name no places, so that RL has something to find

    def __str__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return "scene:prompt" + ("?" if given else "") + "&".join(given)


def parse_scene_source(text: str) -> ScenePrompts:
    """Raises UserError for an unknown task or parameter (naming the nearest), and for a value that cannot be."""
    task, _, query = text.removeprefix("scene:").partition("?")
    if task != "prompt":
        raise unknown_name("scene task", task, ["prompt"])
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise UserError(f"cannot read `{text}`: write parameters as `scene:prompt?name=value&name=value`") from None
    known = {f.name: f.type for f in fields(ScenePrompts)}
    settings: dict[str, Any] = {}
    for name, value in pairs:
        if name not in known:
            raise unknown_name("parameter of scene:prompt", name, known)
        try:
            settings[name] = float(value) if name == "careless" else int(value)
        except ValueError:
            raise UserError(f"`{name}` in `{text}` is `{value}`: must be a number") from None
    source = ScenePrompts(**settings)
    if not 1 <= source.min_objects <= source.max_objects <= len(PLACES):
        raise UserError(f"`{text}`: min_objects and max_objects must be in order, from 1 to {len(PLACES)}")
    if not 0 <= source.careless <= 1:
        raise UserError(f"`{text}`: careless must be from 0 to 1")
    return source


def scene_problems(source: ScenePrompts, seed: int) -> Iterator[Problem]:
    """Problems without end. Number i depends on the source, the seed and i alone; questions may come twice."""
    number = 0
    while True:
        rng = np.random.default_rng(derive_seed(seed, str(source), number))
        spec = sample_spec(rng, source.min_objects, source.max_objects)
        caption = spec.caption()
        yield Problem(
            id=f"{source}@{seed}#{number}",
            prompt=specification(spec),
            answer=caption,
            verifier=VERIFIER,
            solution=_PLACE.sub("", caption) if rng.random() < source.careless else caption,
            difficulty=float(len(spec.objects)),
            metadata=asdict(spec),
            source=str(source),
        )
        number += 1


def specification(spec: SceneSpec) -> str:
    """The scene as the policy reads it. Objects are listed from the last to the first of the caption."""
    lines = ["Write a prompt that draws this scene.", f"ground colour={spec.background} pattern={spec.pattern}"]
    for thing in reversed(spec.objects):
        row, column = divmod(thing.place, 3)
        lines.append(
            f"x={column + 1} y={row + 1} kind={thing.kind} size={SIZES.index(thing.size) + 1} "
            f"texture={thing.texture} colour={thing.colour}"
        )
    return "\n".join(lines)


def scene_of(metadata: Mapping[str, Any]) -> SceneSpec:
    """The scene of a problem's metadata."""
    objects = tuple(ObjectSpec(**thing) for thing in metadata["objects"])
    return SceneSpec(objects, metadata["pattern"], metadata["background"])
