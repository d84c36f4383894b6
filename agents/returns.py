"""Advantages from rewards and values."""

import numpy as np


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), over T steps of N environments.

    rewards, terminated, truncated: (T, N). values: (T+1, N), where values[t+1] belongs to the observation that step t
    led to, which at the end of an episode is its true final observation. Returns (T, N), so that advantage + value is
    the λ-return; λ = 1 is the n-step return of Mnih et al. (arXiv 1602.01783), from each t to the end of the segment.

    A terminal state is worth 0. A truncated episode (a time limit) goes on in truth, so its last step bootstraps from
    the value of the final observation; neither passes anything on to the step before from the episode after.
    """
    advantages = np.empty_like(rewards)
    carried = np.zeros_like(rewards[0])
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    continues = gamma * lam * ~(terminated | truncated)
    for t in reversed(range(len(rewards))):
        carried = deltas[t] + continues[t] * carried
        advantages[t] = carried
    return advantages
