"""Euler's method for the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, algorithm 1, without churn)."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.schedulers.scheduler import Scheduler
from models.diffusion.schedulers.sigmas import sigmas_at


class Euler(Scheduler):
    """dx̂/dσ = (x̂ − x_0)/σ. Its latents are x̂ = x_0 + σ ε, which `model_input` scales to what the denoiser knows."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}

    def __init__(self, config: SchedulerConfig, steps: int) -> None:
        super().__init__(config, steps)
        self._sigmas = sigmas_at(self._alpha_bar, self.timesteps)
        largest = self._sigmas[0]
        self.initial_std = (largest**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else largest

    def _timesteps(self) -> list[float]:
        if self.config.timestep_spacing == "linspace":  # not rounded
            return np.linspace(0, self.config.num_train_timesteps - 1, self.steps, dtype=np.float32)[::-1].tolist()
        return super()._timesteps()

    def model_input(self, x_BCHW: Tensor, i: int) -> Tensor:
        return x_BCHW / (self._sigmas[i] ** 2 + 1) ** 0.5

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, i: int) -> Tensor:
        return x0_BCHW + self._sigmas[i] * noise_BCHW

    def step(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        alpha_bar = 1 / (sigma**2 + 1)
        x0_BCHW, _ = self.x0_and_noise(prediction_BCHW, x_BCHW * alpha_bar**0.5, alpha_bar)
        return x_BCHW + (sigma_next - sigma) / sigma * (x_BCHW - x0_BCHW)
