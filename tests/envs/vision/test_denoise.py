"""Denoise-v0 on a tiny model: it does DDIM, pays for what is handed in, and control agents can train on it."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from agents.a2c import A2CConfig, train
from envs.control.vector_env import ControlEnv
from envs.vision import shipped_weights
from envs.vision.denoise import DETECTOR_VARIABLE, MAX_GUIDANCE, MODEL_VARIABLE, DenoiseVectorEnv
from launch.config import RunConfig
from launch.run_directory import RunDirectory
from launch.runtime import Runtime
from models.diffusion.folder import load_folder, save_folder
from models.diffusion.pipeline import denoise
from models.diffusion.schedulers import DDIM
from models.errors import UserError
from tests.models.diffusion.small_models import CAPTIONS, tiny_latent_diffusion

BRIGHTNESS = "tests.agents.vision.rewards:brightness"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_folder(tiny_latent_diffusion(), folder)
    return folder


def make(folder: Path, num_envs: int = 3, **changes) -> DenoiseVectorEnv:
    settings = {"model": folder, "reward": BRIGHTNESS, "prompts": CAPTIONS, "grid": 6, "max_stride": 3, "cost": 0.1}
    return DenoiseVectorEnv(num_envs, **settings | changes)


def constant(env: DenoiseVectorEnv, guidance: float, eta: float, stride: int) -> np.ndarray:
    one = [(guidance - 1) / (MAX_GUIDANCE - 1) * 2 - 1, eta * 2 - 1, (stride - 1) / (env.max_stride - 1) * 2 - 1, -1]
    return np.tile(np.array(one, np.float32), (env.num_envs, 1))


def test_a_fixed_schedule_is_ddim(folder: Path) -> None:
    env = make(folder)
    env.reset(seed=0)
    model = load_folder(folder)
    x = env._x_NZhw.clone()
    contexts = model.encode_prompts([CAPTIONS[i] for i in env._prompt_N])
    empty = model.encode_prompts([""] * 3)
    expected = denoise(model.unet, DDIM(model.scheduler.with_name("ddim"), 6), x, contexts, empty, guidance=4.0)
    for _ in range(6):
        observations, rewards, terminated, _, _ = env.step(constant(env, 4.0, 0.0, 1))
        assert rewards.tolist() == pytest.approx([-0.1] * 3)
        assert not terminated.any()
    torch.testing.assert_close(env._x_NZhw, expected, rtol=1e-4, atol=1e-4)
    brightness = model.decode_latents(expected).mean(dim=(1, 2, 3)).numpy()
    assert observations[:, 2] == pytest.approx(brightness, abs=0.01)
    assert sorted(env.pictures) == [0, 1, 2]
    _, rewards, terminated, _, _ = env.step(constant(env, 1.0, 1.0, 3))
    assert terminated.all()
    assert rewards == pytest.approx(brightness, abs=0.01)
    torch.testing.assert_close(env._x_NZhw, expected, rtol=1e-4, atol=1e-4)


def test_longer_strides_end_sooner_and_each_picture_has_its_own_time(folder: Path) -> None:
    env = make(folder)
    env.reset(seed=0)
    strides = np.concatenate([constant(env, 2.0, 0.5, stride)[:1] for stride in (1, 2, 3)])
    ends = []
    for _ in range(7):
        observations, rewards, terminated, truncated, _ = env.step(strides)
        ends.append(terminated.tolist())
        assert not truncated.any()
        assert np.isfinite(observations).all()
    assert np.transpose(ends).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 1],
    ]
    assert rewards[0] > 0  # paid at its end
    assert rewards[1] == pytest.approx(-0.1)  # in the midst of its second picture
    assert rewards[2] > 0
    _, rewards, _, _, _ = env.step(strides)
    assert rewards.tolist() == pytest.approx([0, -0.1, 0])  # dummy steps


def test_after_the_end_a_dummy_step_begins_the_next_picture(folder: Path) -> None:
    env = make(folder, grid=1)
    first, _ = env.reset(seed=0)
    for _ in range(2):
        _, _, terminated, _, _ = env.step(constant(env, 2.0, 0.0, 1))
    assert terminated.all()
    observations, rewards, terminated, _, _ = env.step(constant(env, 2.0, 0.0, 1))
    assert not terminated.any()
    assert (rewards == 0).all()
    assert (observations[:, 0] == 0).all()
    assert not np.array_equal(observations, first)


def test_a_reset_right_after_the_end_leaves_no_dummy_step(folder: Path) -> None:
    env = make(folder, grid=2)
    env.reset(seed=0)
    for _ in range(2):
        env.step(constant(env, 2.0, 0.0, 2))
    env.reset()
    observations, rewards, _, _, _ = env.step(constant(env, 2.0, 0.0, 1))
    assert (observations[:, 0] == 0.5).all()
    assert rewards.tolist() == pytest.approx([-0.1] * 3)


def test_another_picture_of_the_same_caption(folder: Path) -> None:
    env = make(folder, max_steps=3)
    env.reset(seed=0)
    prompts, noise = env._prompt_N.copy(), env._x_NZhw.clone()
    again = constant(env, 2.0, 0.0, 3)
    again[1:, 3] = 0.1
    env.step(again)
    assert env._position_N.tolist() == [3, 3, 3]  # before a picture is finished that number counts for nothing
    first, _, _, _, _ = env.step(again)
    worth = first[:, 2]
    assert (worth > 0).all()
    observations, rewards, terminated, _, _ = env.step(again)
    assert terminated.tolist() == [True, False, False]
    assert rewards.tolist() == pytest.approx([worth[0], -0.1, -0.1])
    assert env._position_N.tolist()[1:] == [3, 3]
    assert env._prompt_N.tolist() == prompts.tolist()
    assert observations[1:, 2].tolist() == [0, 0]
    assert observations[1:, 1].tolist() == [1, 1]
    observations, rewards, terminated, _, _ = env.step(again)  # there are no more steps for a third
    assert terminated.tolist() == [False, True, True]
    assert rewards[1:] == pytest.approx(observations[1:, 2] - 0.1)
    assert not np.allclose(observations[1:, 2], worth[1:])
    env.reset(seed=0)
    assert torch.equal(env._x_NZhw, noise)


def test_repeats_by_seed(folder: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        env = make(folder)
        env.reset(seed=seed)
        runs.append([env.step(constant(env, 3.0, 1.0, 2))[0] for _ in range(3)])
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_by_its_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_weights, "WEIGHTS", tmp_path)  # of an installation without any
    with pytest.raises(UserError, match=f"no diffusion model .* comes with this installation.*{MODEL_VARIABLE}"):
        ControlEnv("envs.vision:Denoise-v0", 2)
    monkeypatch.setenv(MODEL_VARIABLE, str(folder))
    with pytest.raises(UserError, match=f"no detr model .* comes with this installation.*{DETECTOR_VARIABLE}"):
        ControlEnv("envs.vision:Denoise-v0", 2)


def test_a_control_agent_trains_on_it(folder: Path, tmp_path: Path) -> None:
    settings = {"model": str(folder), "reward": BRIGHTNESS, "prompts": CAPTIONS, "grid": 4}
    gymnasium.register("TestDenoise-v0", vector_entry_point="envs.vision.denoise:DenoiseVectorEnv", kwargs=settings)
    config = A2CConfig(
        env="TestDenoise-v0", steps=32, workers=1, envs_per_worker=2, n_steps=4, segments=2, eval_episodes=2,
        eval_every=32, log_every=16,
    )  # fmt: skip
    run = Runtime("a2c", RunConfig(backend="local"), RunDirectory.create(tmp_path, "run", {"job": "a2c"}))
    train(config, run)
    run.close()
    assert "eval/return_mean" in run.summary_metrics()


def test_bad_settings(folder: Path) -> None:
    with pytest.raises(UserError, match="max_stride 0"):
        make(folder, max_stride=0)
    with pytest.raises(UserError, match="max_steps 0"):
        make(folder, max_steps=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_pictures_are_drawn(folder: Path) -> None:
    """By CUDA graphs, of all pictures in every step, whichever of them move."""
    envs = [make(folder, device=device) for device in ("cpu", "cuda")]
    for env in envs:
        env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions_NA = rng.uniform(-1, 1, (3, 4)).astype(np.float32)
        expected, seen = (env.step(actions_NA) for env in envs)
        np.testing.assert_allclose(seen[0], expected[0], rtol=0.02, atol=0.02)  # convolutions in TF32
        assert (seen[2] == expected[2]).all()
