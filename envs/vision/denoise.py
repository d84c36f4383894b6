"""Denoise-v0: sampling from a diffusion model as a decision process. The agent steers, a reward model pays.

An episode is one picture. At each step the agent says how strongly to follow the caption, how much fresh noise to add,
and how far to go; each step costs, so a good agent finishes in few. At the end the picture is decoded and paid.

    longstride train a2c --env envs.vision:Denoise-v0

Shapes: N environments, Z latent channels, h × w latent pixels, M tokens of width E.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from envs.vision.image_rewards import AGREEMENT, RewardScorer
from envs.vision.loaded_models import shared_diffusion
from envs.vision.scenes import SceneConfig, Split, scene_caption
from envs.vision.settings import vision_device, vision_split
from envs.vision.shipped_weights import scenes_model
from models.diffusion.noise_schedule import draw_noise
from models.diffusion.schedulers import DDIM
from models.errors import UserError

MODEL_VARIABLE, DETECTOR_VARIABLE = "LONGSTRIDE_DENOISE_MODEL", "LONGSTRIDE_DENOISE_DETECTOR"
MAX_GUIDANCE = 10.0
SCENES = SceneConfig(max_objects=3)  # as those that the diffusion model of scenes was trained on


class DenoiseVectorEnv(VectorEnv):
    """`num_envs` pictures at once, in one batch of the network.

    Action, three numbers in [-1, 1]: guidance from 1 to 10; η of DDIM from 0 to 1 (Song et al. 2021, eq. 16); the
    stride from 1 to `max_stride` positions of a grid of `grid` timesteps. Observation: how far the picture is, the
    last action, mean and deviation of each channel of the latent and of the x_0 predicted last, the strength of the
    caption's pull, and the mean hidden state of the caption.

    model: Stable Diffusion folder, by default what LONGSTRIDE_DENOISE_MODEL names, or else the one that comes with the
    package. reward: as `longstride train ddpo` has them; detector: of scene-agreement, by default what
    LONGSTRIDE_DENOISE_DETECTOR names, or else the package's. prompts: by default captions of the scenes of a split.
    cost: of a step. split, device: settings.py has the defaults.
    Autoreset is NEXT_STEP. Raises UserError for models and rewards that cannot be loaded, and for rewards that fail.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        model: str | Path = "",
        reward: str = AGREEMENT,
        detector: str | Path = "",
        prompts: Sequence[str] = (),
        grid: int = 20,
        max_stride: int = 4,
        cost: float = 0.02,
        split: Split | None = None,
        device: str | None = None,
    ) -> None:
        if max_stride < 1 or cost < 0:
            raise UserError(f"Denoise-v0: max_stride {max_stride} must be positive, cost {cost} not negative")
        model = scenes_model("diffusion", model or os.environ.get(MODEL_VARIABLE), MODEL_VARIABLE)
        eye = None
        if reward == AGREEMENT:
            eye = scenes_model("detr", detector or os.environ.get(DETECTOR_VARIABLE), DETECTOR_VARIABLE)
        device, split = vision_device(device), vision_split(split)
        self.num_envs, self.cost, self.max_stride = num_envs, cost, max_stride
        self._model = shared_diffusion(model, device)
        self._scorer = RewardScorer(reward, eye, device)
        self._ddim = DDIM(self._model.scheduler.with_name("ddim"), grid)
        self._alpha_bars = torch.tensor(self._ddim.alpha_bars(), device=device)  # of the grid and of its end
        self._times = torch.tensor(self._ddim.timesteps, device=device)
        self._prompts = list(prompts) or [scene_caption(SCENES, 0, i, split) for i in range(256)]
        self._contexts_PME = self._model.encode_prompts(self._prompts)
        self._empty_ME = self._model.encode_prompts([""])[0]
        channels = self._model.unet.config.in_channels
        width = 5 + 4 * channels + self._contexts_PME.shape[-1]
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        side = self._model.unet.config.sample_size
        if side is None:
            raise UserError(f"{model}/unet/config.json: names no sample_size")
        self._x_NZhw = torch.zeros(num_envs, channels, side, side, device=device)
        self._x0_NZhw = torch.zeros_like(self._x_NZhw)
        self._pull_N = torch.zeros(num_envs, device=device)
        self._actions_N3 = np.zeros((num_envs, 3), np.float32)
        self._position_N = np.zeros(num_envs, np.int64)
        self._prompt_N = np.zeros(num_envs, np.int64)
        self._finished_N = np.zeros(num_envs, bool)
        self._rng = np.random.default_rng()
        self.pictures: dict[int, np.ndarray] = {}  # of the environments whose episode ended in the last step

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)  # type: ignore[arg-type]
        self._finished_N[:] = False
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Environments that have just finished ignore their action, pay 0 and begin a new picture."""
        rewards = np.zeros(self.num_envs)
        moving = np.flatnonzero(~self._finished_N)
        starting = np.flatnonzero(self._finished_N)
        self._finished_N[:] = False
        self.pictures = {}
        if len(moving):
            actions = np.asarray(actions, np.float32).clip(-1, 1)
            self._denoise(moving, actions[moving])
            rewards[moving] -= self.cost
            done = moving[self._position_N[moving] == len(self._times)]
            if len(done):
                rewards[done] += self._pay(done)
                self._finished_N[done] = True
        if len(starting):
            self._begin(starting)
        return self._observe(), rewards, self._finished_N.copy(), np.zeros(self.num_envs, bool), {}

    def _begin(self, which: np.ndarray) -> None:
        self._prompt_N[which] = self._rng.integers(len(self._prompts), size=len(which))
        self._position_N[which] = 0
        self._actions_N3[which] = 0
        self._x_NZhw[which] = self._noise(len(which))
        self._x0_NZhw[which] = 0
        self._pull_N[which] = 0

    @torch.no_grad()
    def _denoise(self, which: np.ndarray, actions_B3: np.ndarray) -> None:
        """One step of DDIM for each, from its own timestep to its own."""
        share_B3 = torch.from_numpy((actions_B3 + 1) / 2).to(self._x_NZhw.device)[..., None, None, None]
        guidance_B, eta_B = 1 + (MAX_GUIDANCE - 1) * share_B3[:, 0], share_B3[:, 1]
        strides = 1 + np.rint((actions_B3[:, 2] + 1) / 2 * (self.max_stride - 1)).astype(np.int64)
        begin = self._position_N[which]
        end = np.minimum(begin + strides, len(self._times))
        x_BZhw = self._x_NZhw[which]
        without, with_text = self._predictions(x_BZhw, self._times[begin], self._contexts_PME[self._prompt_N[which]])
        prediction_BZhw = without + guidance_B * (with_text - without)
        alpha_bar, alpha_bar_end = (self._alpha_bars[at][:, None, None, None] for at in (begin, end))
        x0_BZhw, noise_BZhw = self._ddim.x0_and_noise(prediction_BZhw, x_BZhw, alpha_bar)
        variance = (1 - alpha_bar_end) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_end)
        std_B = eta_B * variance.clamp_min(0).sqrt()
        direction = (1 - alpha_bar_end - std_B**2).clamp_min(0).sqrt()
        mean_BZhw = alpha_bar_end.sqrt() * x0_BZhw + direction * noise_BZhw
        self._x_NZhw[which] = mean_BZhw + std_B * self._noise(len(which))
        self._x0_NZhw[which] = x0_BZhw
        self._pull_N[which] = (with_text - without).square().mean(dim=(1, 2, 3)).sqrt()
        self._actions_N3[which] = actions_B3
        self._position_N[which] = end

    def _predictions(self, x_BZhw: Tensor, time_B: Tensor, context_BME: Tensor) -> tuple[Tensor, Tensor]:
        empty_BME = self._empty_ME.expand_as(context_BME)
        both = self._model.unet(
            torch.cat([x_BZhw, x_BZhw]), torch.cat([time_B, time_B]), torch.cat([empty_BME, context_BME])
        )
        without, with_text = both.chunk(2)
        return without, with_text

    def _pay(self, done: np.ndarray) -> np.ndarray:
        images = self._model.decode_latents(self._x_NZhw[done])
        pictures = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        self.pictures = dict(zip(done.tolist(), pictures))
        return self._scorer.score(pictures, [self._prompts[i] for i in self._prompt_N[done]])

    def _observe(self) -> np.ndarray:
        statistics = [
            moment
            for latents in (self._x_NZhw, self._x0_NZhw)
            for moment in (latents.mean(dim=(2, 3)), latents.std(dim=(2, 3)))
        ]
        caption_NE = self._contexts_PME[self._prompt_N].mean(dim=1)
        seen = torch.cat([*statistics, self._pull_N[:, None], caption_NE], dim=1).cpu().numpy()
        progress = self._position_N[:, None] / len(self._times)
        return np.concatenate([progress, self._actions_N3, seen], axis=1).astype(np.float32)

    def _noise(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(self._rng.integers(2**63)))
        return draw_noise((count, *self._x_NZhw.shape[1:]), generator, self._x_NZhw.device)
