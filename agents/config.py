"""The settings that every control agent has."""

import math
from dataclasses import dataclass
from typing import ClassVar

from models.control.numpy_policies import Activation
from models.errors import UserError


@dataclass(frozen=True)
class ControlConfig:
    env: str = "CartPole-v1"
    """Gymnasium id. `module:Id-v0` imports the module first; also `module:Class`, or `envpool:Id-v0`."""
    steps: int = 300_000
    """Environment steps, over all workers."""
    workers: int = 2
    envs_per_worker: int = 8
    gamma: float = 0.99
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, of each network."""
    activation: Activation = "tanh"
    eval_episodes: int = 100
    eval_every: int = 50_000
    """Environment steps from one evaluation and checkpoint to the next."""
    log_every: int = 10_000
    """Environment steps from one line of metrics to the next."""
    step_timeout_s: float = 60.0
    """An environment that takes longer over one step ends the run."""
    worker_timeout_s: float = 120.0
    """A call that takes a worker longer ends the worker, and is repeated by a new one."""
    videos: int = 0
    """Episodes that `longstride evaluate` films, as GIF files in the run's rollouts."""

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"gamma", "videos"})
    """Names of settings that may be 0; any other number must be positive."""
    at_most_one: ClassVar[frozenset[str]] = frozenset({"gamma"})
    any_number: ClassVar[frozenset[str]] = frozenset()
    of_the_policy: ClassVar[tuple[str, ...]] = ("activation",)
    """Names of settings that say, beside the weights and their shapes, what the policy does."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag = f"--{name.replace('_', '-')} is {value}"
            if name == "hidden" and min(value, default=1) < 1:
                raise UserError(f"{flag}: widths must be positive")
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise UserError(f"{flag}: must be finite")
            if name in self.any_number:
                continue
            zero = name in self.may_be_zero
            if zero and value < 0:
                raise UserError(f"{flag}: must not be negative")
            if not zero and value <= 0:
                raise UserError(f"{flag}: must be positive")
            if name in self.at_most_one and value > 1:
                raise UserError(f"{flag}: must be at most 1")
