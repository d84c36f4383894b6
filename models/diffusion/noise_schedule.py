"""The forward process: how noise grows with the timestep, and what the denoiser is trained to predict.

x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, with ᾱ_t = Π (1 − β_s) (Ho et al. 2020, arXiv 2006.11239, eq. 4).
Shapes: B latents (B, C, H, W); T timesteps of training.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from models.errors import UserError, unknown_name

NAMES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++",
}
_CLASSES = {name: cls for cls, name in NAMES.items()}
# Settings of variants that are not implemented, with the value of the one that is.
_FIXED = {
    "trained_betas": None, "thresholding": False, "variance_type": "fixed_small", "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0, "interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None,
    "sigma_max": None, "final_sigmas_type": "zero", "solver_order": 2, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "euler_at_final": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_lu_lambdas": False, "use_flow_sigmas": False, "lambda_min_clipped": -math.inf,
}  # fmt: skip
_FREE = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "lower_order_final",
    "flow_shift",
    "time_shift_type",
    "use_dynamic_shifting",
}  # fmt: skip  (of variants above, or without effect here)
_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


@dataclass(frozen=True)
class SchedulerConfig:
    """scheduler_config.json. Fields that are None have defaults that differ from scheduler to scheduler."""

    name: str = "pndm"  # ddpm, ddim, pndm, euler or dpm++
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 0
    timestep_spacing: str | None = None
    set_alpha_to_one: bool | None = None  # the ᾱ that the last step leads to: 1, or ᾱ_0
    clip_sample: bool | None = None  # whether a predicted x_0 is clamped to [-1, 1]
    skip_prk_steps: bool = False

    @classmethod
    def sd_v1(cls, name: str = "pndm") -> "SchedulerConfig":
        return cls(
            name, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            set_alpha_to_one=False, clip_sample=False, skip_prk_steps=True,
        )  # fmt: skip

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> "SchedulerConfig":
        """Raises UserError for an unknown class, and for settings that are not supported."""
        class_name = content.get("_class_name")
        if class_name not in NAMES:
            raise UserError(f"{source}: _class_name is {class_name!r}; use one of {', '.join(NAMES)}")
        given: dict[str, Any] = {"name": NAMES[class_name]}
        known = {field.name for field in fields(cls)} - {"name"}
        for key, value in content.items():
            if key in known:
                given[key] = value
            elif key in _FIXED:
                # A null stands for the default, except where another scheduler's default is not ours.
                if value is not None and value != _FIXED[key]:
                    raise UserError(f"{source}: {key} is {value!r}; only {_FIXED[key]!r} is supported")
            elif not key.startswith("_") and key not in _FREE and value not in (None, False):
                raise UserError(f"{source}: {key} is {value!r}, which is not supported")
        for key, choices in _CHOICES.items():
            if given.get(key) is not None and given[key] not in choices:
                raise UserError(f"{source}: {key} is {given[key]!r}; use {', '.join(choices)}")
        return cls(**given)

    def in_pipeline(self) -> "SchedulerConfig":
        """As StableDiffusionPipeline has it, whatever scheduler_config.json says: latents are never clamped, and
        "leading" timesteps begin at 1. Settings that later schedulers inherit through `with_name`, too."""
        return replace(self, steps_offset=1, clip_sample=False)

    def to_json(self) -> dict[str, Any]:
        given = {key: value for key, value in asdict(self).items() if value is not None and key != "name"}
        return {"_class_name": _CLASSES[self.name], **given}

    def with_name(self, name: str) -> "SchedulerConfig":
        """The same noise for another scheduler. Raises UserError for an unknown one."""
        if name not in _CLASSES:
            raise unknown_name("scheduler", name, _CLASSES)
        return replace(self, name=name)


class NoiseSchedule:
    """ᾱ of every timestep, and the targets of training."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.prediction_type = config.prediction_type
        self.alpha_bar_T = torch.cumprod(1.0 - _betas(config), dim=0)

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """x_t of the forward process (DDPM eq. 4), one timestep per latent."""
        signal, sigma = self._amplitudes(time_B)
        return signal * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """What the denoiser should say: ε, or the velocity √ᾱ ε − √(1 − ᾱ) x_0 (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise_BCHW
        signal, sigma = self._amplitudes(time_B)
        return signal * noise_BCHW - sigma * x0_BCHW

    def _amplitudes(self, time_B: Tensor) -> tuple[Tensor, Tensor]:
        self.alpha_bar_T = self.alpha_bar_T.to(time_B.device)
        alpha_bar = self.alpha_bar_T[time_B][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def draw_noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal, float32. A generator of the CPU gives the same numbers for every device."""
    drawn_on = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on).to(device)


def _betas(config: SchedulerConfig) -> Tensor:
    start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":  # latent diffusion's: linear in √β
        return torch.linspace(start**0.5, end**0.5, count).square()
    # Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17, with β clipped at 0.999.
    cosines = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(cosines)])
