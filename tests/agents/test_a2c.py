from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import a2c
from agents.a2c import A2C, A2CConfig
from agents.on_policy import batch
from agents.rollout import RolloutConfig, RolloutWorker
from models.errors import UserError
from tests.agents.runs import runtime, train

HERE = "tests.envs.control.environments"


def test_it_learns_cartpole(tmp_path: Path) -> None:
    """In a fifth of the default steps; a random policy lasts 22 steps."""
    found = train(
        "a2c",
        A2CConfig(steps=60_000, eval_every=60_000, workers=1, envs_per_worker=16, eval_episodes=20),
        tmp_path,
        "run",
    )
    assert found["eval/return_mean"] > 150
    assert found["eval/return_std"] >= 0
    assert found["time/env_steps_per_s"] > 0


def test_it_learns_which_action_pays(tmp_path: Path) -> None:
    """Counting pays the action, which is at most 3, for 5 steps. Its actions start at 1."""
    config = A2CConfig(env=f"{HERE}:Counting-v0", steps=20_000, eval_every=20_000, eval_episodes=10, lr=3e-3)
    assert train("a2c", config, tmp_path, "run")["eval/return_mean"] == 15


def test_it_learns_to_reach(tmp_path: Path) -> None:
    """Continuous actions of two numbers with different bounds; a policy that does not move gets -0.8."""
    config = A2CConfig(env=f"{HERE}:Reaching", steps=40_000, eval_every=40_000, lr=3e-3, log_std_init=-1.0, ent_coef=0)
    assert train("a2c", config, tmp_path, "run")["eval/return_mean"] > -0.1


@pytest.mark.parametrize("env", ["Counting-v0", "Reaching"])
def test_gradients_are_those_of_the_objective(env: str) -> None:
    """A·∇log π and the squared distance to the λ-return, over the valid steps only, against a loop."""
    config = A2CConfig(env=f"{HERE}:{env}", ent_coef=0.1, max_grad_norm=1e9)
    learner = A2C(config, seed=0)
    rollout = RolloutConfig(config.env, 4, learner.policy.numpy_policy, 0, config.gamma, 60)
    segment = RolloutWorker(rollout).collect(learner.snapshot(), config.n_steps, 0, True)
    assert not segment.valid.all()
    observations = torch.from_numpy(segment.observations)
    values = learner.critic(observations).detach().numpy()
    steps = batch(segment, values, config)
    counted = np.argwhere(segment.valid)

    objective = torch.tensor(0.0)
    for i, (t, n) in enumerate(counted):
        pi = learner.policy(observations[t, n])
        policy = -steps.advantages[i] * pi.log_prob(torch.as_tensor(segment.actions[t, n])) - 0.1 * pi.entropy()
        value = (learner.critic(observations[t, n]) - steps.targets[i]) ** 2
        objective = objective + (policy + value) / len(counted)
    parameters = [p for network in learner.networks.values() for p in network.parameters()]
    expected = torch.autograd.grad(objective, parameters)
    learner.update_on(segment)
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_more_steps_of_the_critic_leave_the_actor_s_step_as_it_is() -> None:
    config = A2CConfig(env=f"{HERE}:Reaching")
    once, often = A2C(config, seed=0), A2C(replace(config, critic_steps=20), seed=0)
    rollout = RolloutConfig(config.env, 4, once.policy.numpy_policy, 0, config.gamma, 60)
    segment = RolloutWorker(rollout).collect(once.snapshot(), config.n_steps, 0, True)
    losses = [learner.update_on(segment)["train/value_loss"] for learner in (once, often)]
    assert losses[0] == losses[1]  # of the critic that the advantages come from
    np.testing.assert_array_equal(once.policy.flat_weights(), often.policy.flat_weights())
    values = A2C(config, seed=0).critic(torch.from_numpy(segment.observations)).detach().numpy()
    steps = batch(segment, values, config)
    errors = [(learner.critic(steps.observations) - steps.targets).square().mean() for learner in (once, often)]
    assert errors[1] < 0.5 * errors[0]


def test_a_call_is_cut_into_segments() -> None:
    config = A2CConfig(n_steps=4, segments=3)
    learner = A2C(config, seed=0)
    assert config.steps_per_call == 12
    seen = []
    learner.update_on = lambda segment: seen.append(segment) or {"train/x": 1.0}  # type: ignore
    rollout = RolloutConfig(config.env, 2, learner.policy.numpy_policy, 0, config.gamma, 60)
    fragment = RolloutWorker(rollout).collect(learner.snapshot(), 12, 0, True)
    assert learner.update(fragment)["train/x"] == pytest.approx(1)
    np.testing.assert_array_equal(np.concatenate([segment.rewards for segment in seen]), fragment.rewards)
    assert replace(config, segments=1).steps_per_call == 4


def test_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    run.device = "cuda"
    with pytest.raises(UserError, match="--device cuda: this agent learns on the CPU"):
        a2c.train(A2CConfig(), run)
    run.close()
