"""Denoise-v0: sampling from a diffusion model as a decision process. The agent steers, a reward model pays.

An episode is one caption. At each step the agent says how strongly to follow it, how much fresh noise to add, and how
far to go; each step costs, so a good agent takes few. It is shown what the finished picture is worth, and hands it in,
which ends the episode and pays that, or draws another one.

    longstride train a2c --env envs.vision:Denoise-v0

Shapes: N environments, B of them, A numbers of an action, Z latent channels, h × w latent pixels, M tokens of width E.
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
from models.diffusion.graphed_unet import GraphedUNet
from models.diffusion.noise_schedule import draw_noise
from models.diffusion.schedulers import DDIM
from models.errors import UserError

MODEL_VARIABLE, DETECTOR_VARIABLE = "LONGSTRIDE_DENOISE_MODEL", "LONGSTRIDE_DENOISE_DETECTOR"
MAX_GUIDANCE = 5.0
ACTIONS = 4  # numbers of an action
SCENES = SceneConfig(max_objects=3)  # as those that the diffusion model of scenes was trained on


class DenoiseVectorEnv(VectorEnv):
    """`num_envs` pictures at once, in one batch of the network.

    Action, four numbers in [-1, 1]: guidance from 1 to `MAX_GUIDANCE`; η of DDIM from 0 to 1 (Song et al. 2021,
    eq. 16); the stride from 1 to `max_stride` positions of a grid of `grid` timesteps; and what to do with a finished
    picture, before which this number counts for nothing. Above 0, the step is the first of another picture of the same
    caption; otherwise the picture is handed in, at no cost. After `max_steps` steps it is handed in as it is finished.

    Observation: how far the picture is, the part of `max_steps` that is used, the reward of a finished picture (before,
    0), the last action, mean and deviation of each channel of the latent and of the x_0 predicted last, and the
    strength of the caption's pull.

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
        max_steps: int = 40,
        cost: float = 0.005,
        split: Split | None = None,
        device: str | None = None,
    ) -> None:
        if max_stride < 1 or max_steps < 1 or cost < 0:
            given = f"max_stride {max_stride}, max_steps {max_steps}, cost {cost}"
            raise UserError(f"Denoise-v0: {given}: strides and steps must be positive, the cost not negative")
        model = scenes_model("diffusion", model or os.environ.get(MODEL_VARIABLE), MODEL_VARIABLE)
        eye = None
        if reward == AGREEMENT:
            eye = scenes_model("detr", detector or os.environ.get(DETECTOR_VARIABLE), DETECTOR_VARIABLE)
        device, split = vision_device(device), vision_split(split)
        self.num_envs, self.cost = num_envs, cost
        self.max_stride, self.max_steps = max_stride, max_steps
        self._model = shared_diffusion(model, device)
        unet = self._model.unet
        self._unet = GraphedUNet(unet) if device.startswith("cuda") else unet
        self._scorer = RewardScorer(reward, eye, device)
        self._ddim = DDIM(self._model.scheduler.with_name("ddim"), grid)
        self._alpha_bars = torch.tensor(self._ddim.alpha_bars(), device=device)  # of the grid and of its end
        self._times = torch.tensor(self._ddim.timesteps, device=device)
        self._prompts = list(prompts) or [scene_caption(SCENES, 0, i, split) for i in range(256)]
        self._contexts_PME = self._model.encode_prompts(self._prompts)
        self._empty_ME = self._model.encode_prompts([""])[0]
        channels = self._model.unet.config.in_channels
        width = 4 + ACTIONS + 4 * channels
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        side = self._model.unet.config.sample_size
        if side is None:
            raise UserError(f"{model}/unet/config.json: names no sample_size")
        self._x_NZhw = torch.zeros(num_envs, channels, side, side, device=device)
        self._x0_NZhw = torch.zeros_like(self._x_NZhw)
        self._pull_N = torch.zeros(num_envs, device=device)
        self._actions_NA = np.zeros((num_envs, ACTIONS), np.float32)
        self._worth_N = np.zeros(num_envs, np.float32)
        self._steps_N = np.zeros(num_envs, np.int64)
        self._position_N = np.zeros(num_envs, np.int64)
        self._prompt_N = np.zeros(num_envs, np.int64)
        self._finished_N = np.zeros(num_envs, bool)
        self._rng = np.random.default_rng()
        self.pictures: dict[int, np.ndarray] = {}  # the last finished of each environment

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)  # type: ignore[arg-type]
        self._finished_N[:] = False
        self._begin(np.arange(self.num_envs))
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Environments that have just finished ignore their action, pay 0 and begin with another caption."""
        actions_NA = np.asarray(actions, np.float32).clip(-1, 1)
        rewards_N = np.zeros(self.num_envs)
        starting, running_N = np.flatnonzero(self._finished_N), ~self._finished_N
        self._finished_N[:] = False
        drawn_N, again_N = running_N & (self._position_N == len(self._times)), actions_NA[:, 3] > 0
        self._hand_in(np.flatnonzero(drawn_N & ~again_N), rewards_N)
        self._draw_anew(np.flatnonzero(drawn_N & again_N))
        moving = np.flatnonzero(running_N & ~self._finished_N)
        if len(moving):
            self._denoise(moving, actions_NA[moving])
            rewards_N[moving] -= self.cost
            drawn = moving[self._position_N[moving] == len(self._times)]
            self._look_at(drawn)
            self._hand_in(drawn[self._steps_N[drawn] >= self.max_steps], rewards_N)
        self._begin(starting)
        return self._observe(), rewards_N, self._finished_N.copy(), np.zeros(self.num_envs, bool), {}

    def _begin(self, which: np.ndarray) -> None:
        if len(which):
            self._prompt_N[which] = self._rng.integers(len(self._prompts), size=len(which))
            self._steps_N[which] = 0
            self._actions_NA[which] = 0
            self._draw_anew(which)

    def _draw_anew(self, which: np.ndarray) -> None:
        if len(which):
            self._position_N[which] = 0
            self._x_NZhw[which] = self._noise(len(which))
            self._x0_NZhw[which] = 0
            self._pull_N[which] = 0
            self._worth_N[which] = 0

    @torch.no_grad()
    def _denoise(self, which: np.ndarray, actions_BA: np.ndarray) -> None:
        """One step of DDIM for each, from its own timestep to its own."""
        share_BA = torch.from_numpy((actions_BA + 1) / 2).to(self._x_NZhw.device)[..., None, None, None]
        guidance_B, eta_B = 1 + (MAX_GUIDANCE - 1) * share_BA[:, 0], share_BA[:, 1]
        strides = 1 + np.rint((actions_BA[:, 2] + 1) / 2 * (self.max_stride - 1)).astype(np.int64)
        begin = self._position_N[which]
        end = np.minimum(begin + strides, len(self._times))
        x_BZhw = self._x_NZhw[which]
        without, with_text = (prediction_NZhw[which] for prediction_NZhw in self._predictions())
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
        self._actions_NA[which] = actions_BA
        self._position_N[which] = end
        self._steps_N[which] += 1

    def _predictions(self) -> tuple[Tensor, Tensor]:
        """The noise in all pictures, without and with their captions. In those that are finished too, for one shape."""
        x_NZhw, context_NME = self._x_NZhw, self._contexts_PME[self._prompt_N]
        time_N = self._times[np.minimum(self._position_N, len(self._times) - 1)]
        both = self._unet(
            torch.cat([x_NZhw, x_NZhw]),
            torch.cat([time_N, time_N]),
            torch.cat([self._empty_ME.expand_as(context_NME), context_NME]),
        )
        without, with_text = both.chunk(2)
        return without, with_text

    def _look_at(self, drawn: np.ndarray) -> None:
        if len(drawn):
            images_B3HW = self._model.decode_latents(self._x_NZhw[drawn])
            pictures = (images_B3HW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
            self._worth_N[drawn] = self._scorer.score(pictures, [self._prompts[i] for i in self._prompt_N[drawn]])
            self.pictures |= dict(zip(drawn.tolist(), pictures))

    def _hand_in(self, which: np.ndarray, rewards_N: np.ndarray) -> None:
        rewards_N[which] += self._worth_N[which]
        self._finished_N[which] = True

    def _observe(self) -> np.ndarray:
        statistics = [
            moment
            for latents in (self._x_NZhw, self._x0_NZhw)
            for moment in (latents.mean(dim=(2, 3)), latents.std(dim=(2, 3)))
        ]
        seen = torch.cat([*statistics, self._pull_N[:, None]], dim=1).cpu().numpy()
        progress_N, used_N = self._position_N / len(self._times), self._steps_N / self.max_steps
        counts_N3 = np.stack([progress_N, used_N, self._worth_N], axis=1)
        return np.concatenate([counts_N3, self._actions_NA, seen], axis=1).astype(np.float32)

    def _noise(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(self._rng.integers(2**63)))
        return draw_noise((count, *self._x_NZhw.shape[1:]), generator, self._x_NZhw.device)
