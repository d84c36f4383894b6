"""Each scheduler over its whole loop, step by step, against diffusers with the same denoiser."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from models.diffusion.noise_schedule import NAMES, NoiseSchedule, SchedulerConfig
from models.diffusion.schedulers import DDIM, make_scheduler
from models.errors import UserError

CLASS_OF = {name: getattr(diffusers, cls) for cls, name in NAMES.items()}
PIXEL_SPACE = SchedulerConfig()  # all defaults: linear β, clipping, set_alpha_to_one where that is the default

CASES = [
    pytest.param(name, base, steps, id=f"{name}-{kind}-{steps}")
    for name in CLASS_OF
    for kind, base in (("sd_v1", SchedulerConfig.sd_v1()), ("defaults", PIXEL_SPACE))
    for steps in (1, 2, 7, 50)
    # diffusers' PNDM fails with a single step, and with a history shorter than its order
    if name != "pndm" or steps > (1 if base.skip_prk_steps else 3)
]


def reference(config: SchedulerConfig, steps: int) -> Any:
    settings = {key: value for key, value in config.to_json().items() if key != "_class_name"}
    scheduler = CLASS_OF[config.name].from_config(settings)
    scheduler.set_timesteps(steps)
    return scheduler


def denoiser(x: Tensor, time: float) -> Tensor:
    """A smooth function of both that no solver integrates exactly."""
    return 0.9 * torch.tanh(x) + 0.1 * torch.sin(x.flip(-1)) * (1 + time / 1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize(("name", "base", "steps"), CASES)
def test_every_step_of_the_loop(
    name: str, base: SchedulerConfig, steps: int, spacing: str | None, prediction_type: str
) -> None:
    config = replace(base, name=name, timestep_spacing=spacing, prediction_type=prediction_type)
    theirs, ours = reference(config, steps), make_scheduler(config, steps)
    assert ours.timesteps == pytest.approx(theirs.timesteps.tolist())
    assert ours.initial_std == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    x = expected = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * ours.initial_std
    random, their_random = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    takes_generator = {} if name == "pndm" else {"generator": their_random}
    for i, time in enumerate(theirs.timesteps):
        model_input = theirs.scale_model_input(expected, time)
        torch.testing.assert_close(ours.model_input(x, i), model_input, rtol=1e-4, atol=1e-4)
        x = ours.step(denoiser(ours.model_input(x, i), ours.timesteps[i]), i, x, random)
        prediction = denoiser(model_input, float(time))
        expected = theirs.step(prediction, time, expected, **takes_generator).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("base", [SchedulerConfig.sd_v1("ddim"), replace(PIXEL_SPACE, name="ddim")])
def test_ddim_with_noise(base: SchedulerConfig, eta: float) -> None:
    theirs, ours = reference(base, 10), DDIM(base, 10, eta)
    x = expected = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    random, their_random = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for i, time in enumerate(theirs.timesteps):
        x = ours.step(denoiser(x, float(time)), i, x, random)
        expected = theirs.step(
            denoiser(expected, float(time)), time, expected, eta=eta, generator=their_random
        ).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASS_OF)
def test_noise_of_a_pass_that_begins_midway(name: str) -> None:
    config = SchedulerConfig.sd_v1(name)
    theirs, ours = reference(config, 10), make_scheduler(config, 10)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(4)
    expected = theirs.add_noise(x0, noise, theirs.timesteps[4:5].repeat(3))
    torch.testing.assert_close(ours.add_noise(x0, noise, 4), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_forward_process(beta_schedule: str) -> None:
    config = replace(SchedulerConfig.sd_v1("ddpm"), beta_schedule=beta_schedule, prediction_type="v_prediction")
    theirs, ours = reference(config, 10), NoiseSchedule(config)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0, 500, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, time), theirs.add_noise(x0, noise, time))
    torch.testing.assert_close(ours.target(x0, noise, time), theirs.get_velocity(x0, noise, time))


def test_one_step_of_pndm() -> None:
    """Which diffusers cannot make: DDIM's deterministic step."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = [make_scheduler(SchedulerConfig.sd_v1(name), 1).step(denoiser(x, 1), 0, x) for name in ("pndm", "ddim")]
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)


def test_configuration_survives_json() -> None:
    for name in CLASS_OF:
        config = SchedulerConfig.sd_v1(name)
        assert SchedulerConfig.from_json(config.to_json(), "scheduler_config.json") == config
        saved = dict(CLASS_OF[name]().config) | {"_class_name": CLASS_OF[name].__name__}
        assert SchedulerConfig.from_json(saved, "scheduler_config.json").name == name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"solver_order": 3}, "solver_order"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
    ],
)
def test_unsupported_settings_are_named(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        SchedulerConfig.from_json(SchedulerConfig.sd_v1("dpm++").to_json() | changes, "scheduler_config.json")


@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_step_counts_out_of_range(steps: int) -> None:
    with pytest.raises(UserError, match=f"{steps} sampling steps"):
        make_scheduler(SchedulerConfig.sd_v1("ddim"), steps)  # 1000 leading steps and an offset of 1 end at 1000
