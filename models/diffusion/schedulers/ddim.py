"""DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16): deterministic at η = 0, DDPM's noise at η = 1."""

from typing import Any, ClassVar

from torch import Tensor

from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.schedulers.scheduler import GaussianScheduler


class DDIM(GaussianScheduler):
    """x_{t-1} = √ᾱ_{t-1} x_0 + √(1 − ᾱ_{t-1} − σ²) ε + σ z,
    with σ = η √((1 − ᾱ_{t-1})/(1 − ᾱ_t)) √(1 − ᾱ_t/ᾱ_{t-1})."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True}

    def __init__(self, config: SchedulerConfig, steps: int, eta: float = 0.0) -> None:
        super().__init__(config, steps)
        self.eta = eta

    def mean_and_std(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor) -> tuple[Tensor, float]:
        alpha_bar, alpha_bar_next = self._ends(i)
        x0_BCHW, noise_BCHW = self.x0_and_noise(prediction_BCHW, x_BCHW, alpha_bar)
        if self.config.clip_sample:
            x0_BCHW = x0_BCHW.clamp(-1, 1)
        std = self.std(i)
        direction = (1 - alpha_bar_next - std**2) ** 0.5
        return alpha_bar_next**0.5 * x0_BCHW + direction * noise_BCHW, std

    def std(self, i: int) -> float:
        alpha_bar, alpha_bar_next = self._ends(i)
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        return self.eta * max(variance, 0.0) ** 0.5  # a step from ᾱ_0 to ᾱ_0 may come out as -1e-17

    def alpha_bars(self) -> list[float]:
        """ᾱ at each timestep of the pass and at its end: one number more than there are steps."""
        return [self._ends(i)[0] for i in range(len(self.timesteps))] + [self._alpha_bar_at(-1)]

    def _ends(self, i: int) -> tuple[float, float]:
        """ᾱ where step i begins and where it leads to."""
        time = self.timesteps[i]
        after = time - self.config.num_train_timesteps // self.steps
        return self._alpha_bar[int(time)], self._alpha_bar_at(after)
