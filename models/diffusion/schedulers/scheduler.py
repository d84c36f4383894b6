"""What all schedulers share: the timesteps of one pass, and reading the denoiser's prediction.

A scheduler object is one pass from noise to latent; multistep methods remember the predictions they have seen. Step i
goes from `timesteps[i]` to the next one. Latents are float32 throughout: differences of nearly equal numbers are taken
here. Shapes: x and predictions are (B, C, H, W).
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.diffusion.noise_schedule import NoiseSchedule, SchedulerConfig, draw_noise
from models.errors import UserError


class Scheduler(ABC):
    """timesteps: the time to give to the denoiser at each step, falling; there may be more of them than steps."""

    DEFAULTS: ClassVar[dict[str, Any]] = {}  # for fields of the configuration that are None

    def __init__(self, config: SchedulerConfig, steps: int) -> None:
        missing = {name: value for name, value in self.DEFAULTS.items() if getattr(config, name) is None}
        self.config = replace(config, **missing)
        if not 1 <= steps <= config.num_train_timesteps:
            raise UserError(f"{steps} sampling steps: use 1 to {config.num_train_timesteps}")
        self.steps = steps
        # Python floats of the float32 table: the arithmetic that follows is in float64, and needs no device.
        self._alpha_bar: list[float] = NoiseSchedule(config).alpha_bar_T.tolist()
        self.timesteps = self._timesteps()
        if max(self.timesteps) >= config.num_train_timesteps:
            raise UserError(f"{steps} sampling steps with steps_offset {config.steps_offset} begin after the last "
                            "timestep of training; use fewer steps")  # fmt: skip

    initial_std: float = 1.0
    """Standard deviation of the noise that the pass begins with."""

    def model_input(self, x_BCHW: Tensor, i: int) -> Tensor:
        """What to give to the denoiser at step i."""
        return x_BCHW

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, i: int) -> Tensor:
        """A clean latent as it would be at the beginning of step i."""
        alpha_bar = self._alpha_bar[int(self.timesteps[i])]
        return alpha_bar**0.5 * x0_BCHW + (1 - alpha_bar) ** 0.5 * noise_BCHW

    @abstractmethod
    def step(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent after step i. generator: for methods that add noise."""

    def _timesteps(self) -> list[float]:
        """Spread over the training schedule (Lin et al. 2023, arXiv 2305.08891, table 2)."""
        total, steps = self.config.num_train_timesteps, self.steps
        times: np.ndarray
        if self.config.timestep_spacing == "linspace":
            times = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            times = (np.arange(steps) * (total // steps))[::-1] + self.config.steps_offset
        else:
            times = np.round(np.arange(total, 0, -total / steps)) - 1
        return times.astype(int).tolist()

    def _alpha_bar_at(self, time: float) -> float:
        """ᾱ at a timestep, or at the end of the pass if the timestep is negative."""
        if time >= 0:
            return self._alpha_bar[int(time)]
        return 1.0 if self.config.set_alpha_to_one else self._alpha_bar[0]

    def x0_and_noise(self, prediction_BCHW: Tensor, x_BCHW: Tensor, alpha_bar: Any) -> tuple[Tensor, Tensor]:
        """Both parts of x_t = √ᾱ x_0 + √(1 − ᾱ) ε as the denoiser sees them. alpha_bar: a number, or (B, 1, 1, 1)."""
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (x_BCHW - sigma * prediction_BCHW) / signal, prediction_BCHW
        return signal * x_BCHW - sigma * prediction_BCHW, signal * prediction_BCHW + sigma * x_BCHW


class GaussianScheduler(Scheduler):
    """A scheduler whose step is a sample of a normal distribution, p(x_{t-1} | x_t): a policy, to RL."""

    @abstractmethod
    def mean_and_std(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor) -> tuple[Tensor, float]:
        """Mean (B, C, H, W) and standard deviation of step i."""

    @abstractmethod
    def std(self, i: int) -> float:
        """The standard deviation of step i alone; 0 if the step is deterministic."""

    def step(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean_BCHW, std = self.mean_and_std(prediction_BCHW, i, x_BCHW)
        if std == 0:
            return mean_BCHW
        return mean_BCHW + std * draw_noise(mean_BCHW.shape, generator, x_BCHW.device)
