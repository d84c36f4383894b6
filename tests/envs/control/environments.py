"""Small environments with known answers. `tests.envs.control.environments:NAME` makes them in any process."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


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


class Dictionary(Counting):
    observation_space = Dict({"x": Box(0, 1, (2,))})


class Image(Counting):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class SameStep(gymnasium.vector.VectorEnv):
    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}


for cls in (Counting, Poisoned, Dictionary, Image):
    gymnasium.register(f"{cls.__name__}-v0", entry_point=cls, disable_env_checker=True)
gymnasium.register("Broken-v0", entry_point="no_such_module:NoSuchClass")
