"""Noise that pushes one way for many steps."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """dx = -theta x dt + dW, in steps of dt (Lillicrap et al., arXiv 1509.02971, §7; Euler-Maruyama).

    Its standard deviation grows from 0 at the beginning of an episode towards 1/√(2 theta), over 1/(theta dt) steps.
    """

    theta: float
    dt: float = 0.01

    def step(self, x_NA: np.ndarray, normal_NA: np.ndarray) -> np.ndarray:
        return x_NA * np.float32(1 - self.theta * self.dt) + np.float32(self.dt**0.5) * normal_NA
