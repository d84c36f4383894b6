from pathlib import Path

import pytest
import torch

from agents.ppo import PPO, PPOConfig, clipped_objective
from agents.rollout import RolloutConfig, RolloutWorker
from tests.agents.runs import train

HERE = "tests.envs.control.environments"


def test_the_objective_is_clipped_where_that_makes_it_worse() -> None:
    """The six cases of the paper's figure 1."""
    ratios = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    expected = [0.5, 1.0, 1.2, -0.8, -1.0, -1.5]
    for ratio, advantage, value in zip(ratios, advantages, expected):
        found, _ = clipped_objective(ratio[None].log(), advantage[None], 0.2)
        assert found.item() == pytest.approx(value)
    objective, clipped = clipped_objective(ratios.log(), advantages, 0.2)
    assert objective.item() == pytest.approx(sum(expected) / 6)
    assert clipped.item() == pytest.approx(4 / 6)


def test_it_stops_where_it_has_gone_far_enough() -> None:
    config = PPOConfig(env=f"{HERE}:Counting-v0", epochs=50, max_kl=0.005, lr=1e-2)
    learner = PPO(config, 0)
    rollout = RolloutConfig(config.env, 8, learner.policy.numpy_policy, 0, config.gamma, 60)
    fragment = RolloutWorker(rollout).collect(learner.snapshot(), config.n_steps, 0, True)
    metrics = learner.learn(fragment)
    assert 1 <= metrics["train/epochs"] < 50
    assert metrics["train/kl"] > 0.005


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_distance_that_is_logged_is_that_after_the_last_epoch(epochs: int) -> None:
    config = PPOConfig(env=f"{HERE}:Counting-v0", epochs=epochs, max_kl=10.0)
    learner = PPO(config, 0)
    rollout = RolloutConfig(config.env, 8, learner.policy.numpy_policy, 0, config.gamma, 60)
    fragment = RolloutWorker(rollout).collect(learner.snapshot(), config.n_steps, 0, True)
    metrics = learner.learn(fragment)
    assert metrics["train/epochs"] == epochs
    pi = learner.policy(torch.from_numpy(fragment.observations[:-1]))
    log_ratios = (pi.log_prob(torch.from_numpy(fragment.actions)).detach() - torch.from_numpy(fragment.log_probs))[
        torch.from_numpy(fragment.valid)
    ]
    expected = (log_ratios.exp() - 1 - log_ratios).mean().item()
    assert expected > 1e-5
    assert metrics["train/kl"] == pytest.approx(expected, rel=1e-4)


def test_it_learns_to_reach(tmp_path: Path) -> None:
    """A policy that does not move gets -0.8."""
    config = PPOConfig(env=f"{HERE}:Reaching", steps=30_000, eval_every=30_000, lr=3e-3, log_std_init=-1.0)
    assert train("ppo", config, tmp_path, "run")["eval/return_mean"] > -0.1
