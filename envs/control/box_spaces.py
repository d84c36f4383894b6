"""The spaces of an environment whose actions are continuous. (Temporary: until the common ground has them.)"""

from dataclasses import dataclass

import gymnasium
import numpy as np

from envs.control.vector_env import _name, make_vector_env
from models.errors import UserError


@dataclass(frozen=True)
class BoxSpaces:
    observation_size: int
    low: np.ndarray
    high: np.ndarray

    @property
    def action_size(self) -> int:
        return len(self.low)


def box_spaces(env_id: str) -> BoxSpaces:
    env = make_vector_env(env_id, num_envs=1)
    observations, actions = env.single_observation_space, env.single_action_space
    env.close()
    if not isinstance(observations, gymnasium.spaces.Box) or len(observations.shape) != 1:
        raise UserError(f"{env_id} observes {_name(observations)}: only vectors are supported")
    if not isinstance(actions, gymnasium.spaces.Box) or len(actions.shape) != 1:
        raise UserError(f"{env_id} takes actions from {_name(actions)}: this agent needs continuous actions (a Box)")
    return BoxSpaces(observations.shape[0], actions.low.astype(np.float32), actions.high.astype(np.float32))
