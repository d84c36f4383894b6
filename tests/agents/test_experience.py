"""Against an environment whose steps are known: it observes its step and the last action, and pays the action."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from agents.experience import ExperienceWorker
from agents.noise import OrnsteinUhlenbeck
from agents.rollout import RolloutConfig, Snapshot
from models.control.numpy_policies import NumpyDeterministic
from models.control.q_networks import DeterministicActor

GAMMA = 0.9


class Known(gymnasium.Env):
    """Ends after 4 steps, by itself if the last action was positive and by a time limit otherwise."""

    observation_space = Box(-100, 100, (2,), np.float32)
    action_space = Box(np.float32([-2.0]), np.float32([6.0]))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action in self.action_space
        self.steps += 1
        over, value = self.steps == 4, float(action[0])
        return np.array([self.steps, value], np.float32), value, over and value > 0, over and value <= 0, {}


def worker(noise: OrnsteinUhlenbeck | None = None, std: float = 0.3) -> tuple[ExperienceWorker, Snapshot]:
    torch.manual_seed(0)
    actor = DeterministicActor(2, 1, (8,), "relu", std)
    config = RolloutConfig("tests.agents.test_experience:Known", 3, actor.numpy_policy, 0, GAMMA, 60.0, noise)
    return ExperienceWorker(config, actor_index=1), Snapshot(7, actor.flat_weights())


@pytest.mark.parametrize("random", [True, False])
def test_rows_are_the_transitions(random: bool) -> None:
    actor, snapshot = worker()
    played = actor.experience(None if random else snapshot, 30, round=0, restart=True)
    assert played.policy_version == (None if random else 7)
    observations, actions, rewards, discounts, following = np.split(played.rows, [2, 3, 4, 5], axis=1)
    assert len(played.rows) == 30 * 3 - 3 * 6  # every fifth step is a dummy
    np.testing.assert_array_equal(following[:, 0], observations[:, 0] + 1)  # so the final observation, not the next one
    assert (np.abs(actions) <= 1).all()
    np.testing.assert_allclose(following[:, 1:], 2 + 4 * actions, rtol=1e-5)  # stretched to [-2, 6]
    np.testing.assert_allclose(rewards, following[:, 1:])
    ended = following[:, 0] == 4
    terminal = ended & (following[:, 1] > 0)
    assert terminal.any()
    assert (ended & ~terminal).any()
    np.testing.assert_allclose(discounts[:, 0], np.where(terminal, 0, GAMMA))  # a time limit keeps its discount
    assert len(played.episode_returns) == ended.sum()
    assert played.episode_returns.sum() == pytest.approx(rewards[: len(rewards) // 12 * 12].sum(), rel=1e-4)


def test_the_policy_plays_with_its_noise() -> None:
    actor, snapshot = worker(std=0.0)
    played = actor.experience(snapshot, 10, round=0, restart=True)
    policy = actor.config.policy(snapshot.weights)
    np.testing.assert_allclose(played.rows[:, 2:3], np.tanh(policy(played.rows[:, :2])), atol=1e-6)
    noisy = worker(std=0.1)[0].experience(snapshot, 1000, round=0, restart=True)
    deviations = noisy.rows[:, 2:3] - np.tanh(policy(noisy.rows[:, :2]))
    inside = np.abs(noisy.rows[:, 2:3]) < 1
    assert deviations[inside].std() == pytest.approx(0.1, rel=0.1)


def test_a_restart_depends_on_nothing_that_came_before() -> None:
    (old, snapshot), (fresh, _) = worker(OrnsteinUhlenbeck(0.15)), worker(OrnsteinUhlenbeck(0.15))
    for round in range(3):
        old.experience(snapshot, 7, round, restart=round == 0)
    again = [actor.experience(snapshot, 9, 3, restart=True).rows for actor in (old, fresh)]
    np.testing.assert_array_equal(*again)


def test_fragments_go_on_where_the_last_one_stopped() -> None:
    actor, snapshot = worker()
    one = actor.experience(snapshot, 6, round=0, restart=True)
    two = actor.experience(snapshot, 6, round=1, restart=False)
    assert one.rows[:, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3
    assert two.rows[:, 0].tolist() == [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3 + [1] * 3


def test_ornstein_uhlenbeck_has_the_moments_of_its_equation() -> None:
    process, rng = OrnsteinUhlenbeck(theta=2.0, dt=0.05), np.random.default_rng(0)
    x, earlier = np.zeros((20_000, 1), np.float32), None
    for step in range(120):
        x = process.step(x, rng.standard_normal(x.shape, np.float32))
        if step == 99:
            earlier = x
    phi = 1 - 2.0 * 0.05  # an AR(1) process
    assert x.std() == pytest.approx((0.05 / (1 - phi**2)) ** 0.5, rel=0.02)
    assert np.corrcoef(x[:, 0], earlier[:, 0])[0, 1] == pytest.approx(phi**20, abs=0.02)


def test_a_sampled_evaluation_has_the_noise_that_the_worker_plays_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random walk from 0, in episodes of four steps with a dummy between two."""
    actor, snapshot = worker(OrnsteinUhlenbeck(theta=0.0, dt=1.0))
    noises: list[np.ndarray] = []
    act = NumpyDeterministic.act

    def watched(self: NumpyDeterministic, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        noises.append(noise.copy())
        return act(self, outputs, noise)

    monkeypatch.setattr(NumpyDeterministic, "act", watched)
    assert actor.evaluate(snapshot, 64 * 20, seed=0, greedy=False, slice_s=60) is not None
    spread = np.stack(noises)[..., 0].std(1)
    assert spread[:4] == pytest.approx(np.sqrt([1, 2, 3, 4]), rel=0.3)
    phases = spread[4:99].reshape(19, 5).mean(0)  # of the dummy and the four steps after it
    assert phases == pytest.approx(np.sqrt([1, 2, 3, 4, 5]), rel=0.1)


def test_noise_begins_anew_with_each_episode() -> None:
    actor, snapshot = worker(OrnsteinUhlenbeck(theta=0.01, dt=1e-6), std=1.0)
    for round, (steps, ended) in enumerate([(3, False), (1, True), (1, False), (3, False), (1, True)]):  # third: dummy
        actor.noise_NA[:] = 0.5
        actor.experience(snapshot, steps, round, restart=False)
        assert (np.abs(actor.noise_NA - (0.0 if ended or round == 0 else 0.5)) < 0.1).all()
