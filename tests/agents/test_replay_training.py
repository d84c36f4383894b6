from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import evaluation
from agents.ddpg import DDPG, DDPGConfig
from agents.replay_training import ReplayConfig
from agents.sac import SAC, SACConfig
from agents.td3 import TD3Config
from models.errors import UserError
from tests.agents.runs import assert_equal, final_state, metrics, runtime, train, train_until_killed

SIZES: dict[str, Any] = {
    "steps": 1200,
    "hidden": (32, 32),
    "batch_size": 32,
    "learning_starts": 200,
    "eval_every": 400,
    "eval_episodes": 2,
    "log_every": 100,
    "updates_per_step": 0.2,
    "learner_threads": 1,
    "buffer_size": 500,
}
SHORT: dict[str, ReplayConfig] = {
    "ddpg": DDPGConfig(**SIZES, noise="ou"),
    "td3": TD3Config(**SIZES, lr_schedule="linear"),
    "sac": SACConfig(**SIZES, n_step=3),
}


def test_ddpg_learns_pendulum(tmp_path: Path) -> None:
    """In a third of the steps of the benchmark and on a smaller network; a random policy earns -1200."""
    size: dict[str, Any] = {"hidden": (64, 64), "batch_size": 64, "learner_threads": 1}
    config = DDPGConfig(gamma=0.95, steps=6000, learning_starts=600, eval_every=6000, tau=0.02, **size)
    assert train("ddpg", config, tmp_path, "run")["eval/return_mean"] > -400


@pytest.mark.parametrize(("job", "workers"), [("ddpg", 1), ("ddpg", 2), ("td3", 1), ("sac", 1)])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path, job: str, workers: int) -> None:
    """Networks, targets, optimizers, counters, what is drawn from the replay buffer, and the metrics of each step."""
    config = replace(SHORT[job], workers=workers)
    train(job, config, tmp_path, "whole")
    train_until_killed(job, config, tmp_path, "cut", step=900)
    assert 800 <= final_state(tmp_path, "cut")["env_steps"] < 900
    train(job, config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")
    files = [{f.name: f.read_bytes() for f in (tmp_path / name / "replay").iterdir()} for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train("sac", replace(SHORT["sac"], steps=300, eval_every=300), tmp_path, name, seed=seed)
    states = [final_state(tmp_path, name) for name in "abc"]
    assert_equal(states[0], states[1])
    assert states[0]["replay"]["segments"][0]["sha256"] != states[2]["replay"]["segments"][0]["sha256"]


def test_gradient_steps_keep_their_ratio_to_environment_steps(tmp_path: Path) -> None:
    found = train("ddpg", SHORT["ddpg"], tmp_path, "run")
    state = final_state(tmp_path, "run")
    assert state["gradient_steps"] == int(0.2 * (state["env_steps"] - 200)) == found["train/gradient_steps"]
    assert 0 < found["train/policy_lag"] <= 0.2 * 2 * SHORT["ddpg"].fragment_steps + 1


def test_the_learning_rate_falls_to_zero(tmp_path: Path) -> None:
    train("td3", SHORT["td3"], tmp_path, "run")
    rate = final_state(tmp_path, "run")["optimizers"]["actor"]["param_groups"][0]["lr"]
    assert 0 <= rate < 0.05 * SHORT["td3"].lr


def test_evaluate_plays_the_policy_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agents import ddpg

    snapshots, play_episodes = [], evaluation.play_episodes

    def watched(config: Any, workers: Any, snapshot: Any, *args: Any, **options: Any) -> Any:
        snapshots.append(snapshot)
        return play_episodes(config, workers, snapshot, *args, **options)

    trained = train("ddpg", SHORT["ddpg"], tmp_path, "run")
    monkeypatch.setattr(evaluation, "play_episodes", watched)
    run = runtime(tmp_path, "run", resume=True)
    ddpg.evaluate(replace(SHORT["ddpg"], eval_episodes=10), run)
    run.close()
    found = run.summary_metrics()
    assert found["eval/return_mean"] != trained["eval/return_mean"]  # other episodes
    weights = final_state(tmp_path, "run")["networks"]["actor"].values()
    assert len(snapshots) == 2
    for snapshot in snapshots:
        np.testing.assert_array_equal(snapshot.weights, torch.cat([weight.flatten() for weight in weights]))
    assert found["eval/sampled/return_mean"] != found["eval/return_mean"]
    fresh = runtime(tmp_path, "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        ddpg.evaluate(SHORT["ddpg"], fresh)
    fresh.close()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v1", "has discrete actions, and this agent needs continuous ones"),
        ("tests.agents.test_replay_training:Unbounded", "has actions without bounds"),
    ],
)
def test_actions_that_cannot_be_served(env: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DDPG(replace(SHORT["ddpg"], env=env), seed=0)


def test_a_checkpoint_of_something_else() -> None:
    state = DDPG(SHORT["ddpg"], 0).state()
    with pytest.raises(UserError, match="checkpoint is of Pendulum-v1, not of MountainCarContinuous-v0"):
        DDPG(replace(SHORT["ddpg"], env="MountainCarContinuous-v0"), 0).load_state(state)
    with pytest.raises(UserError, match="not that of --hidden"):
        DDPG(replace(SHORT["ddpg"], hidden=(16,)), 0).load_state(state)
    for change in ({"activation": "tanh"}, {"noise": "gaussian"}, {"noise_std": 0.2}, {"ou_theta": 1.0}):
        with pytest.raises(UserError, match=f"policy has {next(iter(change))} = .*: leave out --"):
            DDPG(replace(SHORT["ddpg"], **change), 0).load_state(state)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite at step"):
        train("ddpg", replace(SHORT["ddpg"], lr=1e30), tmp_path, "run")


def test_weights_that_are_not_finite_stop_the_run_before_they_are_played(tmp_path: Path) -> None:
    """Of one gradient step to a fragment, whose losses are those before it."""
    once = replace(SHORT["ddpg"], learning_starts=31, lr=1e38, updates_per_step=1 / 31, eval_every=1200)
    with pytest.raises(UserError, match="weights are not finite at step 64"):
        train("ddpg", once, tmp_path, "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": 1.5}, "--tau is 1.5: must be at most 1"),
        ({"batch_size": 0}, "--batch-size is 0: must be positive"),
        ({"noise_std": -0.1}, "--noise-std is -0.1: must not be negative"),
        ({"learning_starts": -1}, "--learning-starts is -1"),
        ({"n_step": 33}, "--n-step is 33: must not exceed --fragment-steps 32"),
        ({"learning_starts": 1200}, "--learning-starts is 1200: with --steps 1200 nothing would be learnt"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SHORT["ddpg"], **change)


def test_no_noise_and_no_warm_up_are_settings() -> None:
    replace(SHORT["ddpg"], noise_std=0.0, learning_starts=0, gamma=0.0)


class Unbounded:
    """Only its spaces are looked at."""

    def __new__(cls) -> Any:
        import gymnasium

        env = gymnasium.make("Pendulum-v1").unwrapped
        env.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        return env


def test_bfloat16_products_are_for_cpus_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = replace(SHORT["sac"], matmul_precision="bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UserError, match="--matmul-precision bfloat16: this CPU has no AMX"):
        SAC(rounded, seed=0)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    SAC(rounded, seed=0)
    assert torch.get_float32_matmul_precision() == "medium"
    SAC(SHORT["sac"], seed=0)
    assert torch.get_float32_matmul_precision() == "highest"
