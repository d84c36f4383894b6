"""DDPM: ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7), over any subset of the timesteps."""

from typing import Any, ClassVar

from torch import Tensor

from models.diffusion.schedulers.scheduler import GaussianScheduler


class DDPM(GaussianScheduler):
    """x_{t-1} ~ N(μ̃, β̃): the posterior given x_t and the predicted x_0."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading", "clip_sample": True}

    def mean_and_std(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor) -> tuple[Tensor, float]:
        alpha_bar, alpha_bar_next = self._ends(i)
        alpha = alpha_bar / alpha_bar_next
        x0_BCHW, _ = self.x0_and_noise(prediction_BCHW, x_BCHW, alpha_bar)
        if self.config.clip_sample:
            x0_BCHW = x0_BCHW.clamp(-1, 1)
        from_x0 = alpha_bar_next**0.5 * (1 - alpha) / (1 - alpha_bar)
        from_x = alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
        return from_x0 * x0_BCHW + from_x * x_BCHW, self.std(i)

    def std(self, i: int) -> float:
        alpha_bar, alpha_bar_next = self._ends(i)
        return ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)) ** 0.5

    def _ends(self, i: int) -> tuple[float, float]:
        """ᾱ where step i begins and where it leads to."""
        last = i == len(self.timesteps) - 1
        alpha_bar_next = 1.0 if last else self._alpha_bar[int(self.timesteps[i + 1])]
        return self._alpha_bar[int(self.timesteps[i])], alpha_bar_next
