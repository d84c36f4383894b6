import numpy as np
import pytest

from agents.returns import gae
from agents.vtrace import vtrace

T, N = 20, 6


def segment(seed: int = 0):
    rng = np.random.default_rng(seed)
    rewards, values, log_ratios = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N)), rng.normal(size=(T, N))
    terminated, truncated = rng.random((T, N)) < 0.15, rng.random((T, N)) < 0.15
    return log_ratios, rewards, values, terminated, truncated


def by_definition(log_ratios, rewards, values, terminated, truncated, gamma, lam, rho_bar, c_bar):
    """Equation 1 as it stands: for each s a sum over t of γ^{t-s}, the product of the c between, and δ_t."""
    ratios = np.exp(log_ratios)
    targets, advantages = np.zeros((T, N)), np.zeros((T, N))
    for n in range(N):

        def target(s, n=n):
            total = values[s, n]
            for t in range(s, T):
                product = 1.0
                for i in range(s, t):
                    product *= lam * min(c_bar, ratios[i, n])
                after = 0.0 if terminated[t, n] else values[t + 1, n]
                delta = min(rho_bar, ratios[t, n]) * (rewards[t, n] + gamma * after - values[t, n])
                total += gamma ** (t - s) * product * delta
                if terminated[t, n] or truncated[t, n]:
                    break
            return total

        for s in range(T):
            targets[s, n] = target(s)
            if terminated[s, n]:
                after = 0.0
            elif truncated[s, n] or s == T - 1:
                after = values[s + 1, n]
            else:
                after = target(s + 1)
            advantages[s, n] = min(rho_bar, ratios[s, n]) * (rewards[s, n] + gamma * after - values[s, n])
    return targets, advantages


@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (2.0, 0.7), (np.inf, np.inf)])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 1.0), (1.0, 0.8)])
def test_vtrace_equals_its_definition(gamma: float, lam: float, rho_bar: float, c_bar: float) -> None:
    inputs = segment()
    found = vtrace(*inputs, gamma, lam, rho_bar, c_bar)
    targets, advantages = by_definition(*inputs, gamma, lam, rho_bar, c_bar)
    np.testing.assert_allclose(found.values, targets, atol=1e-12)
    np.testing.assert_allclose(found.advantages, advantages, atol=1e-12)


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_on_policy_the_values_are_the_lambda_returns(lam: float) -> None:
    _, rewards, values, terminated, truncated = segment(1)
    found = vtrace(np.zeros((T, N)), rewards, values, terminated, truncated, 0.9, lam)
    returns = gae(rewards, values, terminated, truncated, 0.9, lam) + values[:-1]
    np.testing.assert_allclose(found.values, returns, atol=1e-12)
    if lam == 1:  # and the advantages those of the n-step return
        np.testing.assert_allclose(found.advantages, returns - values[:-1], atol=1e-12)


def test_the_values_found_are_those_of_the_other_policy() -> None:
    """One step, two actions that pay 0 and 1. Played half and half, judged for a policy that takes the second 9 times
    in 10: with enough plays the mean of v is what that policy earns, while truncation at 1 stays short of it."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 2, (1, 200_000))
    log_ratios = np.log(np.where(actions == 1, 0.9, 0.1) / 0.5)
    values = np.full((2, actions.shape[1]), 0.5)
    ends, never = np.ones(actions.shape, bool), np.zeros(actions.shape, bool)
    plain = vtrace(log_ratios, actions.astype(float), values, ends, never, 0.9, rho_bar=np.inf, c_bar=np.inf)
    assert plain.values.mean() == pytest.approx(0.9, abs=0.005)
    # V moves towards the value of the policy that is proportional to min(ρ̄ μ, π): (0.5, 0.1) / 0.6 here
    truncated = vtrace(log_ratios, actions.astype(float), values, ends, never, 0.9)
    assert truncated.values.mean() - 0.5 == pytest.approx(0.6 * (0.5 / 0.6 - 0.5), abs=0.005)
