"""What a picture is worth: rewards for text-to-image models.

A reward is a function of images (N, H, W, 3) uint8 and their N prompts that returns N numbers. The ones here have
names; any other is given as `module:function`.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from envs.vision.custom_reward import RewardFailed, failure, import_reward
from envs.vision.scene_agreement import SceneAgreement
from envs.vision.shipped_weights import scenes_model
from models.errors import unknown_name

AGREEMENT = "scene-agreement"
Reward = Callable[[np.ndarray, Sequence[str]], Sequence[float]]
_QUALITY = 95  # of the JPEG files, as in the paper's code


def jpeg_incompressibility(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """Kilobytes of each image as a JPEG file (Black et al. 2023, section 5.1)."""
    return [_jpeg_kilobytes(image) for image in images]


def jpeg_compressibility(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """The same, negated."""
    return [-_jpeg_kilobytes(image) for image in images]


NAMED: dict[str, Reward] = {
    "jpeg-compressibility": jpeg_compressibility,
    "jpeg-incompressibility": jpeg_incompressibility,
}


def find_reward(name: str, detector: Path | None = None, device: str = "cpu") -> Reward:
    """A reward by its name or by `module:function`. Raises UserError if there is none.

    detector: DETR of scenes, for `scene-agreement`; None: the one that comes with the package.
    """
    if name == AGREEMENT:
        return SceneAgreement(scenes_model("detr", detector, "--detector"), device)
    if ":" not in name:
        if name not in NAMED:
            raise unknown_name("reward", name, [*NAMED, AGREEMENT])
        return NAMED[name]
    return import_reward(name)


class RewardScorer:
    """An actor that pays for images."""

    def __init__(self, name: str, detector: Path | None = None, device: str = "cpu") -> None:
        self._name, self._reward = name, find_reward(name, detector, device)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Rewards (N,) float64. Raises RewardFailed if the reward raises, or returns anything but N finite numbers."""
        try:
            rewards = np.asarray(self._reward(images, prompts), dtype=np.float64)
        except Exception as error:  # a user's function may raise anything
            raise failure(self._name, error) from error
        if rewards.shape != (len(images),):
            raise RewardFailed(f"reward {self._name}: returned shape {rewards.shape} for {len(images)} images")
        for reward, prompt in zip(rewards, prompts):
            if not np.isfinite(reward):
                raise RewardFailed(f"reward {self._name}: returned {reward} for the prompt {prompt!r}")
        return rewards


def _jpeg_kilobytes(image: np.ndarray) -> float:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="jpeg", quality=_QUALITY)
    return content.tell() / 1000
