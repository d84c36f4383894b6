"""From a prompt to a picture and to what is seen in it. The same seed and prompt give the same picture.

`DiffusionDrawer` is the real thing: latent diffusion draws, DETR looks. `RenderingDrawer` stands in for both where no
model is to be had, in tests and on small machines: it renders the phrases that it understands and tells what it drew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from envs.vision.scene_agreement import SceneDetector
from envs.vision.scene_spec import understood
from envs.vision.scenes import SceneConfig, render
from models.detr.postprocess import Detections
from models.diffusion.folder import load_folder
from models.diffusion.noise_schedule import draw_noise
from models.diffusion.pipeline import text_to_image
from models.errors import UserError
from models.seeding import derive_seed


@dataclass(frozen=True)
class Drawing:
    image: np.ndarray  # (H, W, 3) uint8
    found: Detections


class Drawer(Protocol):
    def __call__(self, prompts: Sequence[str]) -> list[Drawing]:
        """One picture of each prompt, whatever it says."""
        ...


class DiffusionDrawer:
    """All prompts in one batch, on one device. steps: of DPM-Solver++. Raises UserError as the folders' loaders do."""

    def __init__(
        self, diffusion: Path, detector: Path, steps: int = 20, guidance: float = 4.0, seed: int = 0,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self._model = load_folder(diffusion, torch.bfloat16 if device == "cuda" else torch.float32, device)
        self._model.scheduler = self._model.scheduler.with_name("dpm++")  # adds no noise of its own
        self._detect = SceneDetector(detector, device)
        self._steps, self._guidance, self._seed = steps, guidance, seed
        side = self._model.unet.config.sample_size
        if side is None:
            raise UserError(f"{diffusion}/unet/config.json: names no sample_size")
        self._shape = self._model.unet.config.in_channels, side, side

    def __call__(self, prompts: Sequence[str]) -> list[Drawing]:
        noise_BZhw = torch.stack([self._noise(prompt) for prompt in prompts])
        images_BCHW = text_to_image(
            self._model, prompts, steps=self._steps, guidance=self._guidance, latents_BZhw=noise_BZhw
        )
        images = (images_BCHW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return [Drawing(image, found) for image, found in zip(images, self._detect(images), strict=True)]

    def _noise(self, prompt: str) -> torch.Tensor:
        return draw_noise(self._shape, torch.Generator().manual_seed(derive_seed(self._seed, "drawing", prompt)))


class RenderingDrawer:
    """No model in the loop. What a prompt leaves open, its places too, is drawn at random."""

    def __init__(self, seed: int = 0, size: int = 64) -> None:
        self._seed, self._config = seed, SceneConfig(size)

    def __call__(self, prompts: Sequence[str]) -> list[Drawing]:
        return [self._draw(prompt) for prompt in prompts]

    def _draw(self, prompt: str) -> Drawing:
        rng = np.random.default_rng(derive_seed(self._seed, "drawing", prompt))
        scene = render(understood(prompt, rng), rng, self._config)
        seen = np.flatnonzero((scene.boxes[:, 2:] > scene.boxes[:, :2]).all(1))  # not what others hide
        labels, boxes = torch.from_numpy(scene.labels[seen]), torch.from_numpy(scene.boxes[seen])
        return Drawing(scene.image, Detections(torch.ones(len(seen)), labels, boxes, torch.from_numpy(seen)))
