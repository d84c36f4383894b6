"""V-trace: values and advantages of a policy from what another policy played (Espeholt et al., arXiv 1802.01561)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VTrace:
    """values: v_s, the critic's targets (T, N). advantages: what multiplies ∇log π(a_s|s) (T, N), with ρ_s in it."""

    values: np.ndarray
    advantages: np.ndarray


def vtrace(
    log_ratios: np.ndarray,
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """T steps of N environments, played by μ, judged for π.

    log_ratios: log π(a|s) - log μ(a|s) (T, N). rewards, terminated, truncated: (T, N). values: V (T+1, N), where
    values[t+1] belongs to the observation that step t led to, which at the end of an episode is its true final one.

        v_s = V(x_s) + Σ_{t≥s} γ^{t-s} (Π_{i=s}^{t-1} c_i) δ_t            (eq. 1)
        δ_t = ρ_t (r_t + γ V(x_{t+1}) - V(x_t))
        ρ_t = min(ρ̄, π/μ),  c_i = λ min(c̄, π/μ)
        advantage_s = ρ_s (r_s + γ v_{s+1} - V(x_s))                      (§4.2)

    ρ̄ decides which policy's value is found (at ∞ that of π), c̄ only how fast. With π = μ the values are the λ-returns
    of `gae`. Ends of episodes are treated as there: a terminal state is worth 0, after a truncated step v is V of the
    final observation, and nothing passes over an end. The last step of the segment bootstraps from V.
    """
    ratios = np.exp(log_ratios)
    rhos, cs = np.minimum(rho_bar, ratios), lam * np.minimum(c_bar, ratios)
    ends = terminated | truncated
    deltas = rhos * (rewards + gamma * values[1:] * ~terminated - values[:-1])
    corrections = np.empty_like(deltas)  # v_s - V(x_s)
    carried = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        carried = deltas[t] + gamma * cs[t] * ~ends[t] * carried
        corrections[t] = carried
    next_values = values[1:].copy()
    next_values[:-1] += corrections[1:] * ~ends[:-1]
    advantages = rhos * (rewards + gamma * next_values * ~terminated - values[:-1])
    return VTrace(values[:-1] + corrections, advantages)
