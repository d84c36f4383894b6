"""Running mean and variance, for the normalisation of observations and rewards."""

from dataclasses import dataclass
from typing import Any

import numpy as np

CLIP = 10.0
EPSILON = 1e-8


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of numbers, each (D,) in float64.

    Workers count their own fragments; the learner merges them in the workers' order, so that the result does not
    depend on which came first.
    """

    count: float
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def none(cls, size: int) -> "Moments":
        return cls(0.0, np.zeros(size), np.zeros(size))

    @classmethod
    def of(cls, values_XD: np.ndarray) -> "Moments":
        if not len(values_XD):
            return cls.none(values_XD.shape[1])
        mean = values_XD.mean(0, dtype=np.float64)
        return cls(float(len(values_XD)), mean, ((values_XD - mean) ** 2).sum(0, dtype=np.float64))

    def merged(self, other: "Moments") -> "Moments":
        """Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing variances"."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))

    def std(self) -> np.ndarray:
        """(D,); 1 as long as nothing was counted."""
        return np.sqrt(self.m2 / self.count + EPSILON) if self.count else np.ones_like(self.mean)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Moments":
        return cls(state["count"], state["mean"], state["m2"])


@dataclass(frozen=True)
class Normalizer:
    """(x - mean) / std, clipped to ±10, as VecNormalize of Stable-Baselines3 does it."""

    mean: np.ndarray  # (D,) float32
    std: np.ndarray  # (D,) float32

    @classmethod
    def from_moments(cls, moments: Moments) -> "Normalizer":
        return cls(moments.mean.astype(np.float32), moments.std().astype(np.float32))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.clip((x - self.mean) / self.std, -CLIP, CLIP)
