"""Gymnasium environments by id, as vector environments of one kind of autoreset."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from models.errors import UserError, unknown_name


@dataclass(frozen=True)
class ControlSpaces:
    """observation_size: length of the observation vector. actions: number of actions, `first_action` the first."""

    observation_size: int
    actions: int
    first_action: int = 0


def make_vector_env(env_id: str, num_envs: int) -> VectorEnv:
    """Make `num_envs` copies of an environment, by its own vector implementation if it has one.

    Autoreset is gymnasium's NEXT_STEP, the one mode that every vector implementation knows: the observation of an
    episode's last step is its true final observation, and the step after it is a dummy. It ignores the action, pays 0
    and returns the first observation of the next episode; whoever collects must mask it.

    Raises UserError for an unknown id (naming the nearest), and for an environment that cannot be made here.
    """
    with _refusals_named(env_id):
        env = gymnasium.make_vec(env_id, num_envs=num_envs)
    if env.metadata.get("autoreset_mode") is not AutoresetMode.NEXT_STEP:
        env.close()
        raise UserError(f"the vector version of {env_id} does not autoreset in NEXT_STEP mode: it cannot be used here")
    return env


def control_spaces(env_id: str) -> ControlSpaces:
    """The spaces of an environment that a discrete policy on a vector of numbers can serve.

    Raises UserError for any other space, and as `make_vector_env` does.
    """
    env = make_vector_env(env_id, num_envs=1)
    observations, actions = env.single_observation_space, env.single_action_space
    env.close()
    if not isinstance(observations, gymnasium.spaces.Box) or len(observations.shape) != 1:
        raise UserError(
            f"{env_id} observes {_name(observations)}: only vectors (a one-dimensional Box) are supported; wrap the "
            "environment, e.g. in gymnasium.wrappers.FlattenObservation"
        )
    if not isinstance(actions, gymnasium.spaces.Discrete):
        raise UserError(f"{env_id} takes actions from {_name(actions)}: only Discrete actions are supported here")
    return ControlSpaces(observations.shape[0], int(actions.n), int(actions.start))


def as_vectors(observations: np.ndarray, env_id: str) -> np.ndarray:
    """Observations (N, D) as float32. Raises UserError if one is not finite."""
    vectors = np.asarray(observations, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(
            f"{env_id} returned an observation that is not finite: {vectors[~np.isfinite(vectors).all(1)][0]}"
        )
    return vectors


@contextlib.contextmanager
def _refusals_named(env_id: str) -> Iterator[None]:
    try:
        yield
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"environment {env_id} needs a package that is not installed: {error}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise unknown_name("environment", env_id, gymnasium.registry) from error
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"environment {env_id} cannot be made: {error}") from error


def _name(space: gymnasium.Space) -> str:
    shape = f" of shape {space.shape}" if isinstance(space, gymnasium.spaces.Box) else ""
    return f"{type(space).__name__}{shape}"
