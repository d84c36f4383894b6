from pathlib import Path

import numpy as np
import pytest
import torch

from agents.qac import QAC, QACConfig
from agents.rollout import Fragment, RolloutConfig, RolloutWorker
from models.control.distributions import Categorical
from tests.agents.runs import train

HERE = "tests.envs.control.environments"


def learner_and_fragment(env: str, **settings: float) -> tuple[QAC, Fragment]:
    config = QACConfig(env=f"{HERE}:{env}", max_grad_norm=1e9, **settings)  # type: ignore[arg-type]
    learner = QAC(config, 0)
    learner.generator = torch.Generator().manual_seed(0)
    rollout = RolloutConfig(config.env, 4, learner.policy.numpy_policy, 0, config.gamma, 60)
    return learner, RolloutWorker(rollout).collect(learner.snapshot(), 12, 0, True)


@pytest.mark.parametrize("env", ["Counting-v0", "Reaching"])
def test_the_critic_learns_from_the_action_taken_next(env: str) -> None:
    """SARSA: r + γ Q(s', a'), with Q = 0 at a terminal state and Q(s', a') where a time limit cut."""
    learner, fragment = learner_and_fragment(env)
    q = learner.critic
    for t in (0, 3, 4, 5):  # in the midst of episodes, at their end, and at the dummy step after it
        before = {name: value.clone() for name, value in q.state_dict().items()}
        valid = np.flatnonzero(fragment.valid[t])
        loss = torch.tensor(0.0)
        for n in valid:
            at = [torch.as_tensor(x[None]) for x in (fragment.observations[t, n], fragment.actions[t, n])]
            after = [torch.as_tensor(x[None]) for x in (fragment.observations[t + 1, n], fragment.actions[t + 1, n])]
            worth = 0.0 if fragment.terminated[t, n] else q(*after).item()
            loss = loss + (q(*at)[0] - (fragment.rewards[t, n] + learner.config.gamma * worth)) ** 2 / len(valid)
        if len(valid):
            expected = torch.autograd.grad(loss, list(q.parameters()))
            found = learner.update_on(fragment.steps(t, t + 1), torch.from_numpy(fragment.actions[t + 1]))
            assert found["train/value_loss"] == pytest.approx(loss.item(), rel=1e-4)
            for parameter, gradient in zip(q.parameters(), expected):
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)
        q.load_state_dict(before)


@pytest.mark.parametrize("valid", [4, 3, 1])
def test_the_actor_s_gradient_is_that_of_the_objective(valid: int) -> None:
    """(Q - E Q) / σ ∇log π + ent_coef ∇entropy over the valid environments, against a loop; one alone has no σ."""
    learner, fragment = learner_and_fragment("Counting-v0", ent_coef=0.1)
    step = fragment.steps(1, 2)
    step.valid[0, valid:] = False
    differences, gradients = [], []
    for n in range(valid):
        x, a = torch.from_numpy(step.observations[0, n]), int(step.actions[0, n])
        chances = learner.policy.net(x).softmax(-1)
        q = torch.stack([learner.critic(x[None], torch.tensor([i]))[0] for i in range(3)]).detach()
        differences.append((q[a] - (chances.detach() * q).sum()).item())
        gradients.append((chances[a].log(), -(chances * chances.log()).sum()))
    sigma = np.std(differences) + 1e-3 if valid > 1 else 1.0
    objective = sum(d / sigma * log_prob + 0.1 * entropy for d, (log_prob, entropy) in zip(differences, gradients))
    expected = torch.autograd.grad(-objective / valid, list(learner.policy.parameters()))
    learner.update_on(step, torch.from_numpy(fragment.actions[2]))
    for parameter, gradient in zip(learner.policy.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_dummy_steps_are_not_learned_from() -> None:
    learner, fragment = learner_and_fragment("Counting-v0")
    assert not fragment.valid[5].any()
    seen = []
    learner.update_on = lambda step, after: seen.append(step) or {}  # type: ignore
    learner.update(fragment)
    assert len(seen) == 10


def test_the_mean_over_actions() -> None:
    learner, fragment = learner_and_fragment("Counting-v0")
    observations = torch.from_numpy(fragment.observations[0])
    pi = Categorical(torch.tensor([0.2, 0.3, 0.5]).log().expand(4, 3))
    q = [learner.critic(observations, torch.full((4,), a)) for a in range(3)]
    mean = learner.critic.mean(observations, pi, learner.generator)
    torch.testing.assert_close(mean, 0.2 * q[0] + 0.3 * q[1] + 0.5 * q[2])
    learner, fragment = learner_and_fragment("Reaching")
    observations = torch.from_numpy(fragment.observations[0])
    gaussian = learner.policy(observations)
    many = learner.critic.mean(observations, gaussian, learner.generator, samples=4000)
    draws = gaussian.mean + torch.randn(4000, 4, 2, generator=learner.generator)
    expected = learner.critic(observations.expand(4000, 4, 2), draws).mean(0)
    torch.testing.assert_close(many, expected, atol=0.1, rtol=0)


def test_it_learns_which_action_pays(tmp_path: Path) -> None:
    settings = {"lr": 1e-3, "critic_lr": 5e-3, "gamma": 0.9}
    config = QACConfig(env=f"{HERE}:Counting-v0", steps=20_000, eval_every=20_000, eval_episodes=10, **settings)
    assert train("qac", config, tmp_path, "run")["eval/return_mean"] == 15


def test_it_learns_to_reach(tmp_path: Path) -> None:
    """A policy that does not move gets -0.8, one that moves at random much less."""
    settings = {"lr": 1e-3, "critic_lr": 5e-3, "gamma": 0.5, "log_std_init": -1.0}
    config = QACConfig(env=f"{HERE}:Reaching", steps=30_000, eval_every=30_000, **settings)
    assert train("qac", config, tmp_path, "run")["eval/return_mean"] > -0.65
