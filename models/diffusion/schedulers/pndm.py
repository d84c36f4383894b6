"""PNDM (Liu et al. 2022, arXiv 2202.09778): Adams-Bashforth steps of fourth order along the manifold of eq. 9.

How the first steps get their history: by three Runge-Kutta steps of four evaluations each (F-PNDM, algorithm 2), or,
with `skip_prk_steps` as in Stable Diffusion, by lower orders (PLMS): the first step is made twice, the second time with
the mean of the predictions at both of its ends.
"""

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.schedulers.scheduler import Scheduler
from models.errors import UserError

_ORDER = 4
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDM(Scheduler):
    """Has to be stepped in order, from any step on; it makes `steps` + 1 evaluations (with Runge-Kutta `steps` + 9)."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"timestep_spacing": "leading", "set_alpha_to_one": False}

    def __init__(self, config: SchedulerConfig, steps: int) -> None:
        self._stride = config.num_train_timesteps // max(steps, 1)
        super().__init__(config, steps)
        self._noises: list[Tensor] = []  # predictions of the steps so far, the latest last
        self._calls = 0
        self._begin_BCHW: Tensor | None = None  # the latent at the beginning of a step made of several evaluations
        self._weighted_BCHW: Tensor | None = None

    def _timesteps(self) -> list[float]:
        times = super()._timesteps()
        if self.config.skip_prk_steps:
            return times if len(times) == 1 else [*times[:2], *times[1:]]
        if len(times) < _ORDER:
            raise UserError(
                f"PNDM with Runge-Kutta needs at least {_ORDER} sampling steps; {self.steps} were asked for"
            )
        warm_up = []
        for time, after in itertools.pairwise(times[:_ORDER]):
            half = after + self._stride // 2
            warm_up += [time, half, half, after]
        return warm_up + times[_ORDER - 1 :]

    def step(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self._calls += 1
        if self.config.skip_prk_steps:
            return self._linear_multistep(prediction_BCHW, self.timesteps[i], x_BCHW)
        if self._calls != i + 1:
            raise UserError("PNDM with Runge-Kutta cannot begin midway: set skip_prk_steps, or use another scheduler")
        if i < 4 * (_ORDER - 1):
            return self._runge_kutta(prediction_BCHW, i, x_BCHW)
        return self._linear_multistep(prediction_BCHW, self.timesteps[i], x_BCHW)

    def _runge_kutta(self, prediction_BCHW: Tensor, i: int, x_BCHW: Tensor) -> Tensor:
        """One of the four evaluations of a step (eq. 13): at its beginning, twice in its middle, at its end."""
        stage = i % 4
        if stage == 0:
            self._noises.append(prediction_BCHW)
            self._begin_BCHW, self._weighted_BCHW = x_BCHW, torch.zeros_like(x_BCHW)
        assert self._begin_BCHW is not None
        assert self._weighted_BCHW is not None
        self._weighted_BCHW = self._weighted_BCHW + _RUNGE_KUTTA[stage] * prediction_BCHW
        noise_BCHW = self._weighted_BCHW if stage == 3 else prediction_BCHW
        to = self.timesteps[i] - (self._stride // 2 if stage in (0, 2) else 0)
        return self._transfer(self._begin_BCHW, noise_BCHW, self.timesteps[i - stage], to)

    def _linear_multistep(self, prediction_BCHW: Tensor, time: float, x_BCHW: Tensor) -> Tensor:
        if self._calls == 2 and self.config.skip_prk_steps:  # the first step again, with what was seen at its end
            assert self._begin_BCHW is not None
            noise_BCHW = (prediction_BCHW + self._noises[-1]) / 2
            return self._transfer(self._begin_BCHW, noise_BCHW, time + self._stride, time)
        self._noises = [*self._noises[1 - _ORDER :], prediction_BCHW]
        self._begin_BCHW = x_BCHW
        weights = _ADAMS_BASHFORTH[len(self._noises)]
        noise_BCHW = torch.stack([w * noise for w, noise in zip(weights, reversed(self._noises))]).sum(0)
        return self._transfer(x_BCHW, noise_BCHW, time, time - self._stride)

    def _transfer(self, x_BCHW: Tensor, prediction_BCHW: Tensor, time: float, to: float) -> Tensor:
        """φ of eq. 9: DDIM's deterministic step, in a form that does not divide by small numbers."""
        alpha_bar, alpha_bar_to = self._alpha_bar[int(time)], self._alpha_bar_at(to)
        _, noise_BCHW = self.x0_and_noise(prediction_BCHW, x_BCHW, alpha_bar)
        denominator = alpha_bar * (1 - alpha_bar_to) ** 0.5 + (alpha_bar * (1 - alpha_bar) * alpha_bar_to) ** 0.5
        return (alpha_bar_to / alpha_bar) ** 0.5 * x_BCHW - (alpha_bar_to - alpha_bar) / denominator * noise_BCHW
