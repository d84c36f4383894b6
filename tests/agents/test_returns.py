import numpy as np
import pytest

from agents.returns import gae


def by_definition(rewards, values, terminated, truncated, gamma, lam) -> np.ndarray:
    """For each t, the sum over k of (γλ)^k δ_{t+k}, up to the end of the episode or of the segment."""
    steps, envs = rewards.shape
    advantages = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            discount = 1.0
            for k in range(t, steps):
                after = 0.0 if terminated[k, n] else values[k + 1, n]
                advantages[t, n] += discount * (rewards[k, n] + gamma * after - values[k, n])
                discount *= gamma * lam
                if terminated[k, n] or truncated[k, n]:
                    break
    return advantages


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(20, 6)), rng.normal(size=(21, 6))
    terminated, truncated = rng.random((20, 6)) < 0.15, rng.random((20, 6)) < 0.15
    found = gae(rewards, values, terminated, truncated, gamma, lam)
    np.testing.assert_allclose(found, by_definition(rewards, values, terminated, truncated, gamma, lam), atol=1e-12)


def test_n_step_returns_where_lambda_is_one() -> None:
    rewards, values = np.ones((3, 1)), np.array([[5.0], [6.0], [7.0], [8.0]])
    never = np.zeros((3, 1), bool)
    advantages = gae(rewards, values, never, never, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(advantages[:, 0] + values[:-1, 0], [1.75 + 1, 1.5 + 2, 1 + 4])


def test_a_time_limit_bootstraps_and_a_terminal_state_does_not() -> None:
    rewards, values = np.ones((2, 1)), np.array([[10.0], [20.0], [30.0]])
    end, never = np.array([[True], [False]]), np.zeros((2, 1), bool)
    assert gae(rewards, values, end, never, 0.9, 0.9)[0, 0] == pytest.approx(1 - 10)
    assert gae(rewards, values, never, end, 0.9, 0.9)[0, 0] == pytest.approx(1 + 0.9 * 20 - 10)
