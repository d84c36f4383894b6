"""Detect-v0: where to look in a scene that is too large to see at once.

A scene of 512×512 pixels holds small objects. The eye, a DETR trained on scenes of 128 pixels, takes 128×128. An action
looks at a window, which is cut out and brought to the eye's size: the whole scene, one of 2×2 quarters, or one of 4×4
windows, in which objects appear about as large as in the eye's training. What is found joins what was found before.

    reward = quality of all boxes found so far - quality before - cost of a look
    stopping is free and ends the episode

so an episode's return is the final quality (box_quality.py, in [0, 1]) minus the cost of all looks.

Observation, a vector in [-1, 1]: for each window whether it was looked at, how much in it stands out from afar and is
still to be looked at (salience.py, on 16×16 cells; a look takes away the more the closer it is), and how much was found
in it; then (x, y) and salience of the cell that stands out most; then the part of the looks that are left.

`DetectContinuous-v0` takes (x, y, zoom, stop) in [-1, 1] instead of a number: the nearest window of that zoom which has
not been looked at (if none is left, the nearest), or the end if stop > 1/2, so that actions near 0, as an untrained
policy's are, go on.

All environments of a vector are seen by one forward pass of the eye.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from envs.vision.box_quality import box_ious, box_quality
from envs.vision.loaded_models import shared_scene_detector
from envs.vision.salience import inhibit, salience
from envs.vision.scene_spec import STUFF
from envs.vision.scenes import Scene, SceneConfig, Split, make_scene
from envs.vision.settings import vision_device, vision_split
from envs.vision.shipped_weights import scenes_model
from models.detr.detr import DetrOutput, normalise_images
from models.detr.postprocess import Detections, detections, without
from models.errors import UserError
from models.seeding import derive_seed

EYE = 128  # pixels of a side that the eye takes
SCENES = SceneConfig(size=512, min_objects=4, max_objects=10, object_scale=0.25)
LEVELS = ((1, 512), (2, 288), (4, 160))  # windows a side and their pixels; neighbours overlap, so that none cuts all
WINDOWS = [
    (round(column * (SCENES.size - side) / max(1, n - 1)), round(row * (SCENES.size - side) / max(1, n - 1)), side)
    for n, side in LEVELS
    for row in range(n)
    for column in range(n)
]  # (x, y, side) in pixels
STOP, CLOSEST = len(WINDOWS), LEVELS[-1][1]
CENTRES = [
    np.array([((column + 0.5) / n * 2 - 1, (row + 0.5) / n * 2 - 1) for row in range(n) for column in range(n)])
    for n, _ in LEVELS
]  # (x, y) of each level's windows, as DetectContinuous-v0 counts them
CELLS = 16  # of salience, a side
MANY = 4  # objects in a window, and more, are one to the observation
EYE_VARIABLE = "LONGSTRIDE_DETECT_EYE"


class Eye(Protocol):
    def __call__(self, images_BHWC: Tensor) -> Sequence[Detections]:
        """uint8 (B, 128, 128, 3) → boxes in these pixels."""
        ...


class DetrEye:
    """A DETR folder as an eye: things of probability above the threshold. Raises UserError for a detector of other
    classes than scenes have."""

    def __init__(self, folder: str | Path, threshold: float = 0.5, device: str = "cpu") -> None:
        self.model, self.threshold, self.device = shared_scene_detector(folder, device), threshold, device

    @torch.no_grad()
    def __call__(self, images_BHWC: Tensor) -> list[Detections]:
        output = self.model(normalise_images(images_BHWC.to(self.device)), masks=False)
        last = DetrOutput(output.logits_LBQC[-1:].cpu(), output.boxes_LBQ4[-1:].cpu())
        return [without(d, STUFF) for d in detections(last, [(EYE, EYE)] * len(images_BHWC), self.threshold)]


@dataclass
class Episode:
    """One environment's scene and what is known of it."""

    scene: Scene
    pixels_3HW: Tensor  # uint8
    boxes: np.ndarray  # (n, 4) xyxy in the scene's pixels
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n,)
    looked: np.ndarray  # (windows,) bool
    salience: np.ndarray  # (CELLS, CELLS) float32 in [0, 1], of what is still to be looked at
    looks: int = 0
    quality: float = 0.0


class DetectVectorEnv(VectorEnv):
    """eye: a DETR's folder, or anything that finds objects in images; None: what LONGSTRIDE_DETECT_EYE names, or else
    the detector that comes with the package.

    max_looks: an episode ends after so many. split, device (of a folder's DETR): settings.py has the defaults.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012  (gymnasium's way)

    def __init__(
        self,
        num_envs: int = 1,
        eye: str | Path | Eye | None = None,
        continuous: bool = False,
        cost: float = 0.02,
        max_looks: int = 12,
        split: Split | None = None,
        device: str | None = None,
    ) -> None:
        if not 0 <= cost < 1 or max_looks < 1:
            raise UserError(f"Detect-v0: cost {cost} and max_looks {max_looks}: a cost from 0 to 1, at least one look")
        self.num_envs, self.continuous = num_envs, continuous
        self.cost, self.max_looks, self.split = cost, max_looks, vision_split(split)
        if eye is None or isinstance(eye, str | Path):
            named = eye or os.environ.get(EYE_VARIABLE)
            eye = DetrEye(scenes_model("detr", named, EYE_VARIABLE), device=vision_device(device))
        self.eye: Eye = eye
        size = 3 * len(WINDOWS) + 4
        self.single_observation_space = gymnasium.spaces.Box(-1, 1, (size,), np.float32)
        self.single_action_space = (
            gymnasium.spaces.Box(-1, 1, (4,), np.float32) if continuous else gymnasium.spaces.Discrete(STOP + 1)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.seed, self.begun = 0, np.zeros(num_envs, np.int64)  # episodes that each environment has begun
        self.episodes: list[Episode] = []
        self.done = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The scenes that follow depend on the seed alone; without one they go on from the last."""
        if seed is not None:
            self.seed = seed if isinstance(seed, int) else derive_seed(0, *map(str, seed))
            self.begun[:] = 0
        self.episodes = [self._begin(i) for i in range(self.num_envs)]
        self.done[:] = False
        return self._observations(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        choices = [self._choice(a, e) for a, e in zip(np.asarray(actions), self.episodes, strict=True)]
        fresh = self.done.copy()
        looking = [i for i in range(self.num_envs) if not fresh[i] and choices[i] != STOP]
        rewards, terminated = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        if looking:
            views = torch.stack([self._view(self.episodes[i], choices[i]) for i in looking])
            for i, found in zip(looking, self.eye(views), strict=True):
                rewards[i] = self._learn(self.episodes[i], choices[i], found) - self.cost
        for i in range(self.num_envs):
            if fresh[i]:  # the dummy step of autoreset
                self.episodes[i] = self._begin(i)
            else:
                terminated[i] = choices[i] == STOP or self.episodes[i].looks >= self.max_looks
        self.done = terminated
        information = {
            "quality": np.array([e.quality for e in self.episodes], np.float32),
            "looks": np.array([e.looks for e in self.episodes]),
        }
        return self._observations(), rewards, terminated, np.zeros(self.num_envs, bool), information

    def _begin(self, i: int) -> Episode:
        index = derive_seed(self.seed, "detect", i, int(self.begun[i]))
        self.begun[i] += 1
        scene = make_scene(SCENES, self.seed, index, self.split)
        pixels = torch.from_numpy(scene.image).permute(2, 0, 1)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)
        return Episode(scene, pixels, *nothing, np.zeros(len(WINDOWS), bool), salience(scene.image, CELLS))

    def _choice(self, action: Any, episode: Episode) -> int:
        """An action → a window, or STOP. Raises UserError for a number that is none."""
        if not self.continuous:
            if not 0 <= int(action) <= STOP:
                raise UserError(f"Detect-v0: action {action} is not one of 0 to {STOP}")
            return int(action)
        x, y, zoom, stop = (float(v) for v in np.clip(action, -1, 1))
        if stop > 0.5:
            return STOP
        level = min(len(LEVELS) - 1, int((zoom + 1) / 2 * len(LEVELS)))
        first = sum(n * n for n, _ in LEVELS[:level])
        seen = episode.looked[first : first + len(CENTRES[level])]
        distances = np.linalg.norm(CENTRES[level] - (x, y), axis=1)
        if not seen.all():
            distances[seen] = np.inf
        return first + int(distances.argmin())

    def _view(self, episode: Episode, window: int) -> Tensor:
        x, y, side = WINDOWS[window]
        crop = episode.pixels_3HW[None, :, y : y + side, x : x + side].float()
        view = F.interpolate(crop, (EYE, EYE), mode="bilinear", antialias=True)[0]
        return view.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)

    def _learn(self, episode: Episode, window: int, found: Detections) -> float:
        """Merge what was found into what is known; return the quality gained."""
        x, y, side = WINDOWS[window]
        boxes = found.boxes.numpy() * (side / EYE)
        # What an inner edge of the window cuts is seen whole in the next window.
        margin, scene = 0.015 * side, SCENES.size
        low_cut = (boxes[:, :2] < margin) & (np.array([x, y]) > 0)
        high_cut = (boxes[:, 2:] > side - margin) & (np.array([x, y]) + side < scene)
        whole = ~(low_cut | high_cut).any(1)
        boxes = (boxes + np.array([x, y, x, y], np.float32))[whole].astype(np.float32)
        # A close look is worth more than a high score from afar.
        scores = found.scores.numpy()[whole] + (LEVELS[0][1] - side) / LEVELS[0][1]
        merged = _without_doubles(
            np.concatenate([episode.boxes, boxes]),
            np.concatenate([episode.labels, found.labels.numpy()[whole]]),
            np.concatenate([episode.scores, scores.astype(np.float32)]),
        )
        episode.boxes, episode.labels, episode.scores = merged
        inhibit(episode.salience, _cells(window), left=1 - CLOSEST / side)
        episode.looked[window] = True
        episode.looks += 1
        before = episode.quality
        episode.quality = box_quality(episode.boxes, episode.labels, episode.scene.boxes, episode.scene.labels)
        return episode.quality - before

    def _observations(self) -> np.ndarray:
        return np.stack([_observation(episode, self.max_looks) for episode in self.episodes])


def _observation(episode: Episode, max_looks: int) -> np.ndarray:
    centres = (episode.boxes[:, :2] + episode.boxes[:, 2:]) / 2
    standing_out, found = np.zeros(len(WINDOWS)), np.zeros(len(WINDOWS))
    for window, (x, y, side) in enumerate(WINDOWS):
        standing_out[window] = episode.salience[_cells(window)].max()
        found[window] = ((centres >= (x, y)) & (centres < (x + side, y + side))).all(1).sum() / MANY
    row, column = divmod(int(episode.salience.argmax()), CELLS)
    most = (column + 0.5) / CELLS * 2 - 1, (row + 0.5) / CELLS * 2 - 1, episode.salience[row, column]
    left = 1 - episode.looks / max_looks
    return np.concatenate([episode.looked, standing_out, found.clip(max=1), most, [left]]).astype(np.float32)


def _cells(window: int) -> tuple[slice, slice]:
    """Rows and columns of the cells of salience that a window covers, to the nearest."""
    x, y, side = (round(pixels * CELLS / SCENES.size) for pixels in WINDOWS[window])
    return slice(y, y + side), slice(x, x + side)


def _without_doubles(
    boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of boxes that overlap by more than half, the one of the highest score (non-maximum suppression of any class)."""
    kept: list[int] = []
    iou = box_ious(boxes, boxes)
    for i in np.argsort(-scores, kind="stable"):
        if all(iou[i, j] <= 0.5 for j in kept):
            kept.append(int(i))
    return boxes[kept], labels[kept], scores[kept]


class DetectEnv(gymnasium.Env):
    """A vector of one, for what wants a plain environment."""

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium's way)

    def __init__(self, **settings: Any) -> None:
        self.vector = DetectVectorEnv(1, **settings)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        observations, _ = self.vector.reset(seed=seed)
        return observations[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observations, rewards, terminated, _, information = self.vector.step(np.asarray(action)[None])
        return (observations[0], float(rewards[0]), bool(terminated[0]), False,
                {name: value[0] for name, value in information.items()})  # fmt: skip
