"""What every on-policy algorithm has to do: learn, repeat itself, resume, refuse."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import on_policy
from agents.a2c import A2C, A2CConfig
from agents.evaluation import evaluate_and_save
from agents.on_policy import OnPolicyConfig, batch
from agents.ppo import PPO
from agents.qac import QAC
from agents.rollout import RolloutConfig, RolloutWorker
from agents.trpo import TRPO
from launch import jobs
from models.errors import UserError
from tests.agents.runs import assert_equal, final_state, metrics, runtime, train, train_until_killed

HERE = "tests.envs.control.environments"
COUNTING, REACHING = f"{HERE}:Counting-v0", f"{HERE}:Reaching"
SHORT = {"steps": 1800, "workers": 1, "eval_every": 800, "log_every": 400, "eval_episodes": 2, "n_steps": 8}
LEARNERS: dict[str, Any] = {"qac": QAC, "a2c": A2C, "trpo": TRPO, "ppo": PPO}
JOBS = list(LEARNERS)


def short(job: str, **changes: Any) -> Any:
    return jobs.find(job).config_class()(**SHORT | changes)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("job", JOBS)
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path, job: str, env: str) -> None:
    config = short(job, env=env, normalize_observations=True, normalize_rewards=True)
    train(job, config, tmp_path, "whole")
    train_until_killed(job, config, tmp_path, "cut", step=1300)
    assert 800 <= final_state(tmp_path, "cut")["env_steps"] < 1300
    train(job, config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")


@pytest.mark.parametrize("job", ["a2c", "trpo"])
def test_state_dependent_noise_resumes_exactly_too(tmp_path: Path, job: str) -> None:
    config = short(job, env="Pendulum-v1", sde_steps=3, log_std_init=-2.0)
    train(job, config, tmp_path, "whole")
    train_until_killed(job, config, tmp_path, "cut", step=1300)
    train(job, config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert final_state(tmp_path, "cut")["networks"]["policy"]["log_std"].shape == (64, 1)


def test_two_workers_resume_exactly_too(tmp_path: Path) -> None:
    config = short("a2c", workers=2)
    train("a2c", config, tmp_path, "whole")
    train_until_killed("a2c", config, tmp_path, "cut", step=1300)
    train("a2c", config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))


def test_an_overlapping_run_resumes_exactly_too(tmp_path: Path) -> None:
    config = short("a2c", workers=2, overlap=True, normalize_observations=True)
    train("a2c", config, tmp_path, "whole")
    train_until_killed("a2c", config, tmp_path, "cut", step=1300)
    train("a2c", config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    train("a2c", replace(config, overlap=False), tmp_path, "in turns")
    whole, turns = (final_state(tmp_path, name)["networks"]["policy"]["net.0.weight"] for name in ("whole", "in turns"))
    assert not torch.equal(whole, turns)


@pytest.mark.parametrize("overlap", [False, True])
def test_overlapping_calls_are_one_call_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """But for the first, and those after a checkpoint, under which no call is under way."""
    config = short("a2c", workers=2, envs_per_worker=4, overlap=overlap)  # calls of 256 steps
    learn, collect, behind, rounds = A2C.learn, RolloutWorker.collect, [], []

    def learning(self: A2C, fragment: Any) -> Any:
        behind.append(self.round - int(fragment.versions.max()))
        assert (fragment.versions == fragment.versions[0]).all()
        return learn(self, fragment)

    def collecting(self: RolloutWorker, snapshot: Any, steps: int, round: int, restart: bool) -> Any:
        rounds.append(round)
        return collect(self, snapshot, steps, round, restart)

    monkeypatch.setattr(A2C, "learn", learning)
    monkeypatch.setattr(RolloutWorker, "collect", collecting)
    train("a2c", config, tmp_path, "run")
    assert behind == ([0, 1, 1, 1, 0, 1, 1, 0] if overlap else [0] * 8)
    assert rounds == [number for number in range(8) for _ in range(2)], "each has randomness of its own"


@pytest.mark.parametrize("job", JOBS)
def test_the_seed_decides(tmp_path: Path, job: str) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(job, short(job, steps=600), tmp_path, name, seed=seed)
    assert_equal(final_state(tmp_path, "a"), final_state(tmp_path, "b"))
    weights = [final_state(tmp_path, name)["networks"]["policy"]["net.0.weight"] for name in "ac"]
    assert not torch.equal(*weights)


def test_evaluate_plays_the_policy_of_the_checkpoint(tmp_path: Path) -> None:
    config = A2CConfig(env=COUNTING, steps=20_000, eval_every=20_000, eval_episodes=10, lr=3e-3)
    train("a2c", config, tmp_path, "run")
    run = runtime(tmp_path, "run", resume=True)
    jobs.find("a2c").evaluator()(replace(config, eval_episodes=7), run)  # type: ignore[misc]
    run.close()
    assert metrics(tmp_path, "run")[-1]["eval/return_mean"] == 15
    found = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    sampled = found["eval/sampled/return_mean"]
    assert found["eval/episodes"] == 7
    assert 5 < sampled <= 15
    rows = [json.loads(line) for line in next((tmp_path / "run/rollouts").glob("*.jsonl")).read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["greedy"] * 7 + ["sampled"] * 7
    assert rows[0] == {"policy": "greedy", "return": 15, "length": 5}
    assert np.mean([row["return"] for row in rows[7:]]) == pytest.approx(sampled)
    fresh = runtime(tmp_path, "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        jobs.find("a2c").evaluator()(config, fresh)  # type: ignore[misc]
    fresh.close()


def fragment_of(learner: on_policy.Learner, env: str, steps: int = 20) -> Any:
    rollout = RolloutConfig(env, 4, learner.policy.numpy_policy, 0, learner.config.gamma, 60)
    return RolloutWorker(rollout).collect(learner.snapshot(), steps, 0, True)


def test_normalisers_learn_from_fragments_and_are_frozen_in_evaluation(tmp_path: Path) -> None:
    config = short("a2c", env=REACHING, normalize_observations=True, normalize_rewards=True)
    learner = A2C(config, 0)
    fragment = fragment_of(learner, REACHING)
    learner.learn(fragment)
    snapshot = learner.snapshot()
    assert snapshot.normalizer is not None
    np.testing.assert_allclose(snapshot.normalizer.mean, fragment.observations[:-1][fragment.valid].mean(0), atol=1e-6)
    before = copy.deepcopy(learner.state())
    run = runtime(tmp_path, "run")
    workers = learner.start_workers(run)
    for _ in range(2):
        evaluate_and_save(config, run, workers, learner, {}, learner.state)
    run.close()
    assert_equal(learner.state(), before)
    first, second = metrics(tmp_path, "run")
    assert first == second


def test_what_is_learnt_from_is_what_the_policy_saw() -> None:
    """Normalised by the statistics from before the fragment, which the snapshot that played it had."""
    learner, seen = A2C(short("a2c", env=REACHING, normalize_observations=True), 0), []
    learner.update = lambda fragment: seen.append(fragment) or {}  # type: ignore
    for _ in range(2):
        snapshot, fragment = learner.snapshot(), fragment_of(learner, REACHING)
        learner.learn(fragment)
        np.testing.assert_array_equal(seen[-1].observations, snapshot.normalizer(fragment.observations))  # type: ignore
    assert (seen[-1].observations != fragment.observations).any()


def test_rewards_are_divided_by_the_spread_of_the_discounted_return() -> None:
    config = short("a2c", env=COUNTING, normalize_rewards=True)
    learner, seen = A2C(config, 0), []
    learner.update = lambda fragment: seen.append(fragment) or {}  # type: ignore
    fragment = fragment_of(learner, COUNTING)
    learner.learn(fragment)
    std = np.sqrt(fragment.return_moments.m2 / fragment.return_moments.count)
    np.testing.assert_allclose(seen[0].rewards, fragment.rewards / std, rtol=1e-5)


def test_a_batch_holds_the_valid_steps_with_normalised_advantages() -> None:
    learner = A2C(short("a2c", env=COUNTING), 0)
    fragment = fragment_of(learner, COUNTING)
    assert not fragment.valid.all()
    values = np.random.default_rng(0).normal(size=(21, 4)).astype(np.float32)
    steps = batch(fragment, values, learner.config)
    assert len(steps.actions) == fragment.valid.sum()
    assert steps.advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert steps.advantages.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = batch(fragment, values, learner.config, normalize=False)
    torch.testing.assert_close(raw.advantages, raw.targets - torch.from_numpy(values[:-1][fragment.valid]))
    # Dummies do not reach into what is left: any reward there changes nothing.
    poisoned = replace(fragment, rewards=np.where(fragment.valid, fragment.rewards, 1e6).astype(np.float32))
    torch.testing.assert_close(batch(poisoned, values, learner.config).targets, steps.targets)


@pytest.mark.parametrize("job", JOBS)
def test_a_single_step_is_learnt_from(tmp_path: Path, job: str) -> None:
    """One environment, one step an update: nothing to compare it with, so its advantage is left as it is."""
    config = short(job, n_steps=1, envs_per_worker=1, **({"segments": 1, "ent_coef": 0.0} if job == "a2c" else {}))
    learner = LEARNERS[job](config, 0)
    fragment = fragment_of(learner, "CartPole-v1", 2)
    before = learner.policy.flat_weights().copy()
    found = learner.learn(replace(fragment.steps(0, 1), valid=fragment.valid[:1] & (np.arange(4) == 0)))
    assert np.isfinite(list(found.values())).all()
    assert (learner.policy.flat_weights() != before).any()


def test_learning_rates_fall_or_stay() -> None:
    linear, constant = A2C(short("a2c"), 0), A2C(short("a2c", lr_schedule="constant"), 0)
    linear.env_steps = constant.env_steps = 450
    assert linear.rate(4.0) == 3
    assert constant.rate(4.0) == 4
    linear.env_steps = 5000
    assert linear.rate(4.0) == 0
    linear.env_steps = 450
    linear.learn(fragment_of(linear, "CartPole-v1", 8))
    rates = [group["lr"] for group in linear.optimizers["adam"].param_groups]
    assert rates == pytest.approx([0.75 * linear.config.lr, 0.75 * linear.config.critic_lr])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    save = run.save

    def save_then_poison(step: int, state: Any, score: float | None = None) -> None:
        save(step, state, score)
        state["networks"]["critic"]["net.0.weight"].fill_(float("nan"))

    run.save = save_then_poison  # type: ignore[method-assign]
    with pytest.raises(UserError, match="not finite at step "):
        jobs.find("a2c").trainer()(short("a2c"), run)
    run.close()
    assert all(tensor.isfinite().all() for tensor in final_state(tmp_path, "run")["networks"]["critic"].values())


@pytest.mark.parametrize(
    ("job", "settings"),
    [
        ("a2c", {"segments": 1}),
        ("ppo", {"epochs": 1, "minibatch": 100_000}),
        ("ppo", {"epochs": 3}),
        ("qac", {"n_steps": 1}),
        ("offpac", {"replays": 0}),
    ],
)
def test_weights_that_are_not_finite_are_neither_saved_nor_played(
    tmp_path: Path, job: str, settings: dict[str, Any]
) -> None:
    """A single step with such a rate ends there, from a loss that was finite."""
    with pytest.raises(UserError, match=r"weights are not finite at step \d+, and were not saved: try a lower --lr"):
        train(job, short(job, **{"lr": 1e38, "max_grad_norm": 1e9, "eval_every": 50} | settings), tmp_path, "run")
    assert not any((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env": "Acrobot-v1"}, "checkpoint is of CartPole-v1, not of Acrobot-v1"),
        ({"hidden": (32,)}, "not that of --hidden"),
        ({"activation": "relu"}, "policy has activation = tanh, not relu: leave out --activation"),
        ({"normalize_observations": True}, "has normalize_observations = False, not True: leave out --normalize-obs"),
    ],
)
def test_a_checkpoint_of_something_else(change: dict[str, Any], message: str) -> None:
    state = A2C(short("a2c"), 0).state()
    with pytest.raises(UserError, match=message) as caught:
        A2C(short("a2c", **change), 0).load_state(state)
    assert len(str(caught.value).splitlines()) == 1


def test_how_long_noise_is_held_is_the_policy_s() -> None:
    config = short("a2c", env="Pendulum-v1", sde_steps=4)
    state = A2C(config, 0).state()
    A2C(config, 0).load_state(state)
    with pytest.raises(UserError, match="has sde_steps = 4, not 8: leave out --sde-steps"):
        A2C(replace(config, sde_steps=8), 0).load_state(state)


def test_a_checkpoint_of_before_its_settings_were_kept() -> None:
    learner = A2C(short("a2c"), 0)
    state = learner.state()
    del state["settings"]
    A2C(short("a2c", activation="relu"), 0).load_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "--workers is 0: must be positive"),
        ({"n_steps": -1}, "--n-steps is -1"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"gamma": 1.5}, "--gamma is 1.5: must be at most 1"),
        ({"ent_coef": -0.1}, "--ent-coef is -0.1: must not be negative"),
        ({"hidden": (64, 0)}, "widths must be positive"),
        ({"lr": float("nan")}, "--lr is nan: must be finite"),
        ({"lr": float("inf")}, "--lr is inf: must be finite"),
        ({"gamma": float("nan")}, "--gamma is nan: must be finite"),
        ({"step_timeout_s": float("inf")}, "--step-timeout-s is inf: must be finite"),
        ({"log_std_init": float("-inf")}, "--log-std-init is -inf: must be finite"),
        ({"gae_lambda": 1.5}, "--gae-lambda is 1.5: must be at most 1"),
        ({"gae_lambda": -0.5}, "--gae-lambda is -0.5: must not be negative"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        short("a2c", **change)


def test_settings_that_may_be_zero_or_negative() -> None:
    assert short("a2c", ent_coef=0.0, log_std_init=-1.0).ent_coef == 0
    for job in ("a2c", "trpo", "ppo", "offpac"):
        assert short(job, gae_lambda=0.0, gamma=0.0).gae_lambda == 0


def test_settings_that_would_do_nothing() -> None:
    with pytest.raises(UserError, match="--sde-steps 4 is for continuous actions, and those of CartPole-v1 are disc"):
        A2C(short("a2c", sde_steps=4), 0)
    assert not hasattr(short("qac"), "gae_lambda")


def test_an_unknown_environment_starts_nothing(tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    with pytest.raises(UserError, match="did you mean `CartPole-v1`"):
        jobs.find("a2c").trainer()(short("a2c", env="Cartpole-v1"), run)
    run.close()


def test_every_job_names_its_configuration() -> None:
    for job in JOBS:
        assert issubclass(jobs.find(job).config_class(), OnPolicyConfig)
