"""Small environments with known answers. `tests.envs.control.environments:NAME` makes them in any process."""

import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple


class Counting(gymnasium.Env):
    """Observes (steps so far, the last action). Pays the action. Ends after 5 steps: by itself if the last action was
    1, by time limit otherwise. Actions are 1, 2 and 3."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(3, start=1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action in (0, 1, 2, 3)
        self.steps += 1
        over = self.steps == 5
        observation = np.array([self.steps, action], np.float32)
        return observation, float(action), over and action == 1, over and action != 1, {}


class Poisoned(Counting):
    """Observes NaN at its third step."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, *rest = super().step(action)
        return observation * (np.nan if self.steps == 3 else 1), *rest


class Raising(Counting):
    """Divides by zero at its third step."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        _ = 1 / (2 - self.steps)
        return super().step(action)


class Hanging(Counting):
    """Its third step takes a minute."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(60 if self.steps == 2 else 0)
        return super().step(action)


class Straying(Counting):
    """Counts beyond the bounds that it declares."""

    observation_space = Box(np.float32([0.0, -np.inf]), np.float32([3.0, np.inf]))


class Reaching(gymnasium.Env):
    """Observes the goal, a vector in [-1, 1]²; pays minus its squared distance from the action. Five steps, by time
    limit. Its actions have the shape (1, 2) and bounds of their own."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(np.float32([[-0.5, -2.0]]), np.float32([[0.5, 2.0]]))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        self.goal = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.goal, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.steps += 1
        return self.goal, -float(((action[0] - self.goal) ** 2).sum()), False, self.steps == 5, {}


class Dictionary(Counting):
    """Observes its count in many ways."""

    observation_space = Dict(
        {
            "step": Discrete(6),
            "pair": Tuple((Box(0, 5, (1, 2), np.float32), MultiDiscrete([6, 2]))),
        }
    )

    def _observe(self) -> dict[str, Any]:
        count = self.steps
        return {"step": count, "pair": (np.full((1, 2), count, np.float32), np.array([count, count % 2]))}

    def reset(self, **options: Any) -> tuple[Any, dict]:
        super().reset(**options)
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        _, *rest = super().step(action)
        return self._observe(), *rest


class Unmakeable(Counting):
    def __init__(self) -> None:
        raise RuntimeError("no\nlicence")


class ManyActions(Counting):
    action_space = MultiDiscrete([2, 3])


class Image(Counting):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class SameStep(gymnasium.vector.VectorEnv):
    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}


for cls in (Counting, Poisoned, Image):
    gymnasium.register(f"{cls.__name__}-v0", entry_point=cls, disable_env_checker=True)
gymnasium.register("Broken-v0", entry_point="no_such_module:NoSuchClass")
