import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import a2c
from agents.a2c import A2CConfig, Learner
from agents.rollout import RolloutWorker
from envs.control.vector_env import control_spaces
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.run_directory import RunDirectory
from launch.runtime import Runtime
from models.errors import UserError

COUNTING = "tests.envs.control.environments:Counting-v0"
SHORT = A2CConfig(steps=6000, workers=1, eval_every=2000, log_every=1000, eval_episodes=5)


def runtime(path: Path, name: str, seed: int = 0, resume: bool = False) -> Runtime:
    settings = RunConfig(name=name, runs_dir=path, seed=seed, backend="local", keep_checkpoints=10)
    if resume:
        directory = RunDirectory.open(path, name)
        return Runtime("a2c", settings, directory, CheckpointStore(directory.checkpoints, 10).newest())
    return Runtime("a2c", settings, RunDirectory.create(path, name, {"job": "a2c"}))


def final_state(path: Path, name: str) -> dict[str, Any]:
    checkpoint = CheckpointStore(path / name / "checkpoints", 10).newest()
    assert checkpoint is not None
    return checkpoint.load()


def train(config: A2CConfig, path: Path, name: str, **options: Any) -> dict[str, float]:
    run = runtime(path, name, **options)
    try:
        a2c.train(config, run)
    finally:
        run.close()
    return json.loads((path / name / "summary.json").read_text())["metrics"]


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def metrics(path: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


def test_a2c_learns_cartpole(tmp_path: Path) -> None:
    """In a fifth of the default steps; a random policy lasts 22 steps."""
    found = train(A2CConfig(steps=60_000, eval_every=60_000), tmp_path, "run")
    assert found["eval/return_mean"] > 150
    assert found["eval/return_std"] >= 0
    assert found["time/env_steps_per_s"] > 0


def test_a2c_learns_which_action_pays(tmp_path: Path) -> None:
    """Counting pays the action, which is at most 3, for 5 steps. Its actions start at 1."""
    config = A2CConfig(env=COUNTING, steps=20_000, eval_every=20_000, eval_episodes=10, lr=3e-3)
    assert train(config, tmp_path, "run")["eval/return_mean"] == 15


class Killed(BaseException):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path, workers: int) -> None:
    config = replace(SHORT, workers=workers)
    train(config, tmp_path, "whole")

    run = runtime(tmp_path, "cut")
    log = run.log

    def log_until_killed(step: int, *args: Any) -> None:
        if step > 3200:
            raise Killed
        log(step, *args)

    run.log = log_until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        a2c.train(config, run)
    run.close()
    assert 2000 < final_state(tmp_path, "cut")["env_steps"] < 3200

    train(config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(replace(SHORT, steps=1000), tmp_path, name, seed=seed)
    assert_equal(final_state(tmp_path, "a"), final_state(tmp_path, "b"))
    weights = [final_state(tmp_path, name)["net"]["actor.0.weight"] for name in "ac"]
    assert not torch.equal(*weights)


def test_evaluate_plays_the_policy_of_the_checkpoint(tmp_path: Path) -> None:
    config = A2CConfig(env=COUNTING, steps=20_000, eval_every=20_000, eval_episodes=10, lr=3e-3)
    train(config, tmp_path, "run")
    run = runtime(tmp_path, "run", resume=True)
    a2c.evaluate(replace(config, eval_episodes=7), run)
    run.close()
    assert metrics(tmp_path, "run")[-1]["eval/return_mean"] == 15
    fresh = runtime(tmp_path, "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        a2c.evaluate(config, fresh)
    fresh.close()


def test_gradients_are_those_of_the_objective() -> None:
    """A·∇log π and the squared distance to the λ-return, over the valid steps only, against a loop."""
    config = replace(SHORT, env=COUNTING, ent_coef=0.1, max_grad_norm=1e9)
    learner = Learner(config, seed=0)
    worker = RolloutWorker(COUNTING, 4, control_spaces(COUNTING), config.hidden, seed=0)
    segment = worker.collect(learner.policy_weights(), config.n_steps, 0, True)
    assert not segment.valid.all()
    observations = torch.from_numpy(segment.observations)
    values = learner.net.values(observations).detach().numpy()
    advantages, targets = learner._advantages(segment, values)
    counted = [(t, n) for t in range(config.n_steps) for n in range(4) if segment.valid[t, n]]
    assert np.mean([advantages[i] for i in counted]) == pytest.approx(0, abs=1e-6)
    assert np.std([advantages[i] for i in counted]) == pytest.approx(1, abs=1e-5)

    objective = torch.tensor(0.0)
    for t, n in counted:
        log_probs = learner.net.log_probs(observations[t, n])
        policy = -advantages[t, n] * log_probs[segment.actions[t, n]] + 0.1 * (log_probs.exp() * log_probs).sum()
        value = (learner.net.values(observations[t, n]) - targets[t, n]) ** 2
        objective = objective + (policy + value) / len(counted)
    names, parameters = zip(*learner.net.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(objective, parameters)))
    learner._update(segment)
    for name, parameter in learner.net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    save = run.save

    def save_then_poison(step: int, state: Any, score: float | None = None) -> None:
        save(step, state, score)
        state["net"]["critic.0.weight"].fill_(float("nan"))

    run.save = save_then_poison  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite at step 2"):
        a2c.train(SHORT, run)
    run.close()
    assert all(tensor.isfinite().all() for tensor in final_state(tmp_path, "run")["net"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "Acrobot-v1"}, "checkpoint is of CartPole-v1, not of Acrobot-v1"),
        ({"hidden": (32,)}, "not that of --hidden"),
    ],
)
def test_a_checkpoint_of_something_else(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Learner(replace(SHORT, **change), 0).load_state(Learner(SHORT, 0).state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "--workers is 0: must be positive"),
        ({"n_steps": -1}, "--n-steps is -1"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"gamma": 1.5}, "--gamma is 1.5: must be at most 1"),
        ({"ent_coef": -0.1}, "--ent-coef is -0.1: must not be negative"),
        ({"hidden": (64, 0)}, "widths must be positive"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SHORT, **change)


def test_an_unknown_environment_starts_nothing(tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    with pytest.raises(UserError, match="did you mean `CartPole-v1`"):
        a2c.train(replace(SHORT, env="Cartpole-v1"), run)
    run.close()
