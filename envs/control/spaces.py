"""What an environment observes and takes, as the vectors of numbers that control agents work on.

Shapes: N environments, D numbers an observation, A numbers an action.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from models.errors import UserError

TOLERANCE = 1e-3  # of a bound: environments compute in float64 and declare their bounds in float32


@dataclass(frozen=True)
class DiscreteActions:
    """`count` actions. The agents count from 0, the environment from `first`."""

    count: int
    first: int = 0

    def to_env(self, actions_N: np.ndarray) -> np.ndarray:
        return actions_N + self.first if self.first else actions_N


@dataclass(frozen=True)
class BoxActions:
    """Continuous actions: vectors (N, A) for the agents, arrays (N, *shape) for the environment."""

    low: np.ndarray = field(compare=False)  # (A,), may be -inf
    high: np.ndarray = field(compare=False)
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.low)

    def to_env(self, actions_NA: np.ndarray) -> np.ndarray:
        """Clip to the bounds, as for a Gaussian policy, which knows none."""
        return np.minimum(np.maximum(actions_NA, self.low), self.high).reshape(-1, *self.shape)

    def from_unit(self, actions_NA: np.ndarray) -> np.ndarray:
        """[-1, 1] to the bounds, for policies that end in a tanh. Needs finite bounds."""
        return self.low + (actions_NA + 1) * (0.5 * (self.high - self.low))


@dataclass(frozen=True)
class ControlSpaces:
    """observation_size: D. low and high: bounds of the observation vector (D,), ±inf where there are none."""

    observation_size: int
    actions: DiscreteActions | BoxActions
    low: np.ndarray = field(compare=False)
    high: np.ndarray = field(compare=False)


Flatten = Callable[[Any], np.ndarray]  # a batched observation of the environment → (N, D)


def flattener(space: Space, env_id: str) -> tuple[Flatten, np.ndarray, np.ndarray]:
    """Returns the function that makes vectors (N, D) of a batch of `space`, and the bounds (D,) of the vectors.

    A Box is flattened, Discrete and MultiDiscrete become one-hot, and the parts of a Dict or Tuple are put side by
    side, all as `gymnasium.spaces.flatten` does for one observation. Raises UserError for an image or another space.
    """
    match space:
        case spaces.Box() if len(space.shape) > 1 and space.dtype == np.uint8:
            raise UserError(
                f"{env_id} observes images, a Box of shape {space.shape}: the networks here take vectors; give the "
                "environment a wrapper that turns them into features"
            )
        case spaces.Box():
            low, high = (np.asarray(bound, np.float32).reshape(-1) for bound in (space.low, space.high))
            return (lambda batch: np.asarray(batch).reshape(len(batch), -1)), low, high
        case spaces.MultiBinary():
            size = int(np.prod(space.shape))
            return (lambda batch: np.asarray(batch).reshape(len(batch), -1)), np.zeros(size), np.ones(size)
        case spaces.Discrete():
            return _one_hot([int(space.n)], [int(space.start)])
        case spaces.MultiDiscrete():
            return _one_hot(space.nvec.reshape(-1).tolist(), space.start.reshape(-1).tolist())
        case spaces.Tuple():
            return _side_by_side(list(enumerate(space.spaces)), env_id)
        case spaces.Dict():
            return _side_by_side(list(space.spaces.items()), env_id)
    raise UserError(
        f"{env_id} observes a {type(space).__name__}: only Box, Discrete, Dict, Tuple and the like are read"
    )


def _one_hot(counts: list[int], starts: list[int]) -> tuple[Flatten, np.ndarray, np.ndarray]:
    rows = [np.eye(count, dtype=np.float32) for count in counts]

    def flatten(batch: Any) -> np.ndarray:
        columns_NK = np.asarray(batch).reshape(len(batch), -1) - starts
        return np.concatenate([row[columns_NK[:, k]] for k, row in enumerate(rows)], axis=1)

    return flatten, np.zeros(sum(counts)), np.ones(sum(counts))


def _side_by_side(parts: list[tuple[Any, Space]], env_id: str) -> tuple[Flatten, np.ndarray, np.ndarray]:
    made = [(key, *flattener(space, env_id)) for key, space in parts]

    def flatten(batch: Any) -> np.ndarray:
        return np.concatenate([part(batch[key]) for key, part, _, _ in made], axis=1)

    return flatten, np.concatenate([part[2] for part in made]), np.concatenate([part[3] for part in made])


def action_kind(space: Space, env_id: str) -> DiscreteActions | BoxActions:
    """Raises UserError for a space that no algorithm here serves."""
    match space:
        case spaces.Discrete():
            return DiscreteActions(int(space.n), int(space.start))
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            low, high = (np.asarray(bound, np.float32).reshape(-1) for bound in (space.low, space.high))
            return BoxActions(low, high, space.shape)
    raise UserError(
        f"{env_id} takes actions from {space}: only Discrete and floating-point Box are supported; wrap the "
        "environment so that it takes one of them"
    )


def refuse_strange(observations_XD: np.ndarray, low_D: np.ndarray, high_D: np.ndarray, env_id: str) -> None:
    """Raises UserError naming the first observation that is not finite or lies outside its space."""
    slack_D = TOLERANCE * np.maximum(np.abs(np.where(np.isfinite(low_D), low_D, 0)), 1)
    good_XD = (observations_XD >= low_D - slack_D) & np.isfinite(observations_XD)
    slack_D = TOLERANCE * np.maximum(np.abs(np.where(np.isfinite(high_D), high_D, 0)), 1)
    good_XD &= observations_XD <= high_D + slack_D
    if good_XD.all():
        return
    bad = observations_XD[~good_XD.all(-1)][0]
    if not np.isfinite(bad).all():
        raise UserError(f"{env_id} returned an observation that is not finite: {_brief(bad)}")
    where = int(np.flatnonzero((bad < low_D - slack_D) | (bad > high_D + slack_D))[0])
    raise UserError(
        f"{env_id} returned an observation outside its space: number {where} is {bad[where]:.6g}, and its "
        f"observation_space allows {low_D[where]:.6g} to {high_D[where]:.6g}; mend the one or the other"
    )


def _brief(vector: np.ndarray) -> str:
    return " ".join(np.array2string(vector, threshold=8).split())
