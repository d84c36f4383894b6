"""How an agent with continuous actions tries things out: noise around a deterministic policy, or a random policy.

Actions are in [-1, 1]. Shapes: N environments, A numbers an action.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.control.q_networks import LOG_STD_MAX, LOG_STD_MIN


@dataclass(frozen=True)
class Exploration:
    """kind: what the numbers that the actor network puts out mean, and what is added to them.

    gaussian   tanh(output) + N(0, std²), independent at each step
    ou         tanh(output) + an Ornstein-Uhlenbeck process (Lillicrap et al., arXiv 1509.02971, §7), which pushes one
               way for many steps: dx = -theta x dt + std dW, from 0 at the beginning of each episode
    squashed   output is mean and log std of a Gaussian whose tanh is the action (SAC)
    """

    kind: Literal["gaussian", "ou", "squashed"]
    std: float = 0.0
    theta: float = 0.15
    dt: float = 0.01

    def outputs(self, action_size: int) -> int:
        """Width of the actor network's output."""
        return 2 * action_size if self.kind == "squashed" else action_size


class Explorer:
    """Exploration in N environments: keeps the state of the noise between steps."""

    def __init__(self, exploration: Exploration, num_envs: int, action_size: int) -> None:
        self.exploration = exploration
        self.noise_NA = np.zeros((num_envs, action_size), np.float32)

    def begin(self, episodes_N: np.ndarray) -> None:
        """New episodes begin where the mask is true."""
        self.noise_NA[episodes_N] = 0

    def act(self, outputs_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The actor network's outputs → actions to play (N, A)."""
        x, normal_NA = self.exploration, rng.standard_normal(self.noise_NA.shape, np.float32)
        if x.kind == "squashed":
            mean_NA, log_std_NA = np.split(outputs_N, 2, axis=-1)
            return np.tanh(mean_NA + np.exp(log_std_NA.clip(LOG_STD_MIN, LOG_STD_MAX)) * normal_NA)
        if x.kind == "ou":
            self.noise_NA += -x.theta * x.dt * self.noise_NA + np.float32(x.std * x.dt**0.5) * normal_NA
        else:
            self.noise_NA = np.float32(x.std) * normal_NA
        return (np.tanh(outputs_N) + self.noise_NA).clip(-1, 1)

    def greedy(self, outputs_N: np.ndarray) -> np.ndarray:
        return np.tanh(outputs_N[..., : self.noise_NA.shape[-1]])
