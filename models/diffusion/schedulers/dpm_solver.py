"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

With α = √ᾱ, σ = √(1 − ᾱ), λ = log(α/σ) and h the step in λ:
x_t = σ_t/σ_s x_s − α_t (e^{−h} − 1) D,  D = x_0 + (x_0 − x_0')/(2r),  r = h'/h, where a prime marks the step before.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.schedulers.scheduler import Scheduler
from models.diffusion.schedulers.sigmas import sigmas_at


class DPMSolver(Scheduler):
    """The first step and the last, which leads to σ = 0 and so to λ = ∞, are of first order: D = x_0."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"timestep_spacing": "linspace"}

    def __init__(self, config: SchedulerConfig, steps: int) -> None:
        super().__init__(config, steps)
        self._sigmas = sigmas_at(self._alpha_bar, self.timesteps)
        self._x0_before_BCHW: Tensor | None = None

    def _timesteps(self) -> list[float]:
        """As of a pass with one more step, without that step: the pass ends at σ = 0, not at the first timestep."""
        total, steps = self.config.num_train_timesteps, self.steps
        if self.config.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, steps + 1).round()[:0:-1].astype(int).tolist()
        if self.config.timestep_spacing == "leading":
            times = (np.arange(steps + 1) * (total // (steps + 1)))[:0:-1]
            return (times + self.config.steps_offset).tolist()
        return super()._timesteps()

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, i: int) -> Tensor:
        alpha, sigma = _alpha_and_sigma(self._sigmas[i])
        return alpha * x0_BCHW + sigma * noise_BCHW

    def step(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        ratio, ratio_next = self._sigmas[i], self._sigmas[i + 1]  # σ/α
        alpha, sigma = _alpha_and_sigma(ratio)
        alpha_next, sigma_next = _alpha_and_sigma(ratio_next)
        x0_BCHW, _ = self.x0_and_noise(prediction_BCHW, x_BCHW, alpha**2)
        direction_BCHW = x0_BCHW
        if self._x0_before_BCHW is not None and ratio_next > 0:
            h, h_before = math.log(ratio / ratio_next), math.log(self._sigmas[i - 1] / ratio)
            direction_BCHW = x0_BCHW + (x0_BCHW - self._x0_before_BCHW) * (h / (2 * h_before))
        self._x0_before_BCHW = x0_BCHW
        return sigma_next / sigma * x_BCHW - alpha_next * (ratio_next / ratio - 1) * direction_BCHW  # e^{-h}


def _alpha_and_sigma(ratio: float) -> tuple[float, float]:
    """α and σ of σ/α."""
    alpha = (ratio**2 + 1) ** -0.5
    return alpha, ratio * alpha
