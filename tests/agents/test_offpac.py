from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.offpac import OffPAC, OffPACConfig
from agents.rollout import Fragment, RolloutConfig, RolloutWorker
from agents.vtrace import vtrace
from models.errors import UserError
from tests.agents.runs import assert_equal, final_state, metrics, train, train_until_killed

COUNTING = "tests.envs.control.environments:Counting-v0"
SHORT = OffPACConfig(steps=6000, workers=1, eval_every=2000, log_every=500, eval_episodes=5, kept_fragments=8)


def played(config: OffPACConfig, learner: OffPAC) -> Fragment:
    policy = learner.policy.numpy_policy
    worker = RolloutWorker(RolloutConfig(config.env, 4, policy, 0, config.gamma, 60.0))
    return worker.collect(*learner.next_call(restart=True))


@pytest.mark.parametrize("correction", ["vtrace", "plain"])
def test_it_learns_cartpole(tmp_path: Path, correction: Any) -> None:
    """In a tenth of the default steps, from fragments some updates old; a random policy lasts 22 steps."""
    config = OffPACConfig(steps=30_000, workers=1, eval_every=30_000, correction=correction, eval_episodes=20)
    found = train("offpac", config, tmp_path, "run")
    assert found["eval/return_mean"] > 100
    assert found["train/policy_lag"] >= 1


def test_it_learns_a_continuous_action(tmp_path: Path) -> None:
    """Pays less the farther the action is from 1: at most 0 for an episode, -5 for the action that it begins with."""
    config = replace(SHORT, env="tests.agents.test_offpac:NearOne", steps=12_000, eval_every=12_000, ent_coef=0.0)
    assert train("offpac", replace(config, lr=3e-3), tmp_path, "run")["eval/return_mean"] > -0.5


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = replace(SHORT, normalize_observations=True, normalize_rewards=True)
    train("offpac", config, tmp_path, "whole")
    train_until_killed("offpac", config, tmp_path, "cut", step=3200)
    assert 2000 <= final_state(tmp_path, "cut")["env_steps"] < 3200
    train("offpac", config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")


@pytest.mark.parametrize("correction", ["vtrace", "plain"])
def test_gradients_are_those_of_the_objective(correction: Any) -> None:
    """ρ A ∇log π and the squared distance to v, over the valid steps of a fragment that another policy played."""
    config = replace(SHORT, env=COUNTING, ent_coef=0.1, max_grad_norm=1e9, correction=correction)
    learner = OffPAC(config, seed=0)
    fragment = played(config, learner)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert not fragment.valid.all()
    observations = torch.from_numpy(fragment.observations)
    values = learner.critic(observations).detach().numpy()
    pi, actions = learner.policy(observations[:-1]), torch.from_numpy(fragment.actions)
    log_probs = pi.log_prob(actions)
    bound = 1.0 if correction == "vtrace" else np.inf
    flags = fragment.terminated, fragment.truncated
    log_ratios = log_probs.detach().numpy() - fragment.log_probs
    assert np.abs(log_ratios[fragment.valid]).max() > 0.05
    found = vtrace(log_ratios, fragment.rewards, values, *flags, config.gamma, 1.0, bound, bound)
    counted = [(t, n) for t in range(config.n_steps) for n in range(4) if fragment.valid[t, n]]
    scale = np.sqrt(np.mean([found.advantages[i] ** 2 for i in counted]))
    objective = torch.tensor(0.0)
    for t, n in counted:
        chances = pi.log_probs[t, n].exp()
        entropy = -(chances * chances.log()).sum()
        policy = -found.advantages[t, n] / scale * log_probs[t, n] - 0.1 * entropy
        value = (learner.critic(observations[t, n]) - found.values[t, n]) ** 2
        objective = objective + (policy + value) / len(counted)
    parameters = [*learner.policy.parameters(), *learner.critic.parameters()]
    expected = torch.autograd.grad(objective, parameters)
    learner.update_on(fragment)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_fragments_are_learnt_from_again_and_the_oldest_are_dropped() -> None:
    config = replace(SHORT, env=COUNTING, replays=2, kept_fragments=3)
    learner = OffPAC(config, seed=0)
    seen: list[int] = []
    update_on = learner.update_on

    def watched(fragment: Fragment) -> dict[str, float]:
        seen.append(int(fragment.versions[0]))
        return update_on(fragment)

    learner.update_on = watched  # type: ignore[method-assign]
    for update in range(6):
        seen.clear()
        learner.learn(played(config, learner))
        assert seen[0] == update
        assert len(seen) == (3 if update else 1)  # nothing is older than the first
        assert all(update - 3 <= version < update for version in seen[1:])


def test_what_is_learnt_from_again_is_normalised_by_the_statistics_of_now() -> None:
    config = replace(SHORT, env=COUNTING, replays=1, kept_fragments=1, normalize_observations=True)
    learner = OffPAC(replace(config, normalize_rewards=True), seed=0)
    first = played(config, learner)
    learner.learn(first)
    learner.learn(played(config, learner))
    moments = learner.observation_moments
    seen: list[Fragment] = []
    update_on = learner.update_on
    learner.update_on = lambda fragment: seen.append(fragment) or update_on(fragment)  # type: ignore
    kept, third = learner.kept[0], played(config, learner)
    learner.learn(third)
    std = learner.return_moments.std()
    for found, raw in zip(seen, (third, kept), strict=True):
        expected = (raw.observations - moments.mean) / moments.std()
        np.testing.assert_allclose(found.observations, expected, atol=1e-5)
        np.testing.assert_allclose(found.rewards, raw.rewards / std, rtol=1e-5)
    assert learner.kept[0] is third


def test_fragments_of_an_older_checkpoint_are_left_behind_if_they_are_normalised() -> None:
    for normalized, left in ((False, 1), (True, 0)):
        config = replace(SHORT, env=COUNTING, normalize_observations=normalized)
        learner = OffPAC(config, seed=0)
        learner.learn(played(config, learner))
        state = learner.state()
        for older, expected in ((False, 1), (True, left)):
            again = OffPAC(config, seed=0)
            again.load_state({k: v for k, v in state.items() if not older or k != "kept_as_played"})
            assert len(again.kept) == expected


def test_a_checkpoint_of_something_else() -> None:
    state = OffPAC(SHORT, 0).state()
    with pytest.raises(UserError, match="checkpoint is of CartPole-v1"):
        OffPAC(replace(SHORT, env=COUNTING), 0).load_state(state)
    with pytest.raises(UserError, match="not that of --hidden"):
        OffPAC(replace(SHORT, hidden=(16,)), 0).load_state(state)


class NearOne:
    """Five steps; only a function of the action is paid."""

    def __new__(cls) -> Any:
        import gymnasium
        from gymnasium.spaces import Box

        class Environment(gymnasium.Env):
            observation_space = Box(0, 5, (1,), np.float32)
            action_space = Box(-3, 3, (1,), np.float32)

            def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
                self.steps = 0
                return np.zeros(1, np.float32), {}

            def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
                self.steps += 1
                return np.float32([self.steps]), -((float(action[0]) - 1) ** 2), self.steps == 5, False, {}

        return Environment()
