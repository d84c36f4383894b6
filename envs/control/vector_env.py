"""Environments by name, as vector environments of one kind of autoreset, on vectors of numbers.

Names: a Gymnasium id (`CartPole-v1`), `module:Id-v0` to import the module that registers it first, `module:Class` for
an environment class by its import path, and `envpool:CartPole-v1` for envpool's C++ implementation.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from envs.control.spaces import ControlSpaces, action_kind, flattener, refuse_strange
from models.errors import UserError, unknown_name

LEAVE_THEIR_SPACE = {"LunarLander-v3", "LunarLanderContinuous-v3"}
"""Ids of Gymnasium that play on outside the space that they declare: nothing ends the episode of a lander that climbs
(Gymnasium's issue 752). Their observations need only be finite."""


class ControlEnv:
    """`num_envs` copies of an environment, by its own vector implementation if it has one.

    Autoreset is gymnasium's NEXT_STEP, the one mode that every vector implementation knows: the observation of an
    episode's last step is its true final observation, and the step after it is a dummy. It ignores the action, pays 0
    and returns the first observation of the next episode; whoever collects must mask it.

    Raises UserError for an unknown name (naming the nearest), an environment that cannot be made here, and spaces
    that control agents do not serve; and from `reset` and `step` whenever the environment raises anything.
    """

    def __init__(self, env_id: str, num_envs: int, render_mode: str | None = None) -> None:
        self.env_id, self.num_envs = env_id, num_envs
        with _refusals_named(env_id):
            self.env = _make(env_id, num_envs, render_mode)
        if self.env.metadata.get("autoreset_mode") is not AutoresetMode.NEXT_STEP:
            self.env.close()
            raise UserError(
                f"the vector version of {env_id} does not autoreset in NEXT_STEP mode: it cannot be used here"
            )
        self._flatten, low, high = flattener(self.env.single_observation_space, env_id)
        if env_id.rpartition(":")[2] in LEAVE_THEIR_SPACE:
            low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
        self.spaces = ControlSpaces(len(low), action_kind(self.env.single_action_space, env_id), low, high)

    def reset(self, seed: int) -> np.ndarray:
        """Begin new episodes in all environments. Returns observations (N, D) float32."""
        with _failures_named(self.env_id, "reset"):
            return self._vectors(self.env.reset(seed=seed)[0])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """actions: as `spaces.actions.to_env` makes them. Returns observations (N, D), rewards, terminated, truncated.

        Numbers are not checked here but by `check`, once for many steps.
        """
        with _failures_named(self.env_id, "step"):
            observations, rewards, terminated, truncated, _ = self.env.step(actions)
            return self._vectors(observations), rewards, terminated, truncated

    def check(self, observations: np.ndarray, rewards: np.ndarray) -> None:
        """Raises UserError unless all are finite and the observations (..., D) lie in their space."""
        observations_XD = observations.reshape(-1, self.spaces.observation_size)
        refuse_strange(observations_XD, self.spaces.low, self.spaces.high, self.env_id)
        if not np.isfinite(rewards).all():
            raise UserError(f"{self.env_id} paid a reward that is not finite")

    def render(self) -> np.ndarray:
        """A picture (H, W, 3) uint8 of the first environment, which must have been made with a render mode."""
        with _failures_named(self.env_id, "render"):
            picture = (self.env.render() or [None])[0]
        if not isinstance(picture, np.ndarray) or picture.ndim != 3:
            raise UserError(f"environment {self.env_id} draws no pictures (render_mode rgb_array)")
        return picture

    def _vectors(self, batch: Any) -> np.ndarray:
        return np.asarray(self._flatten(batch), dtype=np.float32)

    def close(self) -> None:
        self.env.close()


def control_spaces(env_id: str) -> ControlSpaces:
    """Raises UserError as `ControlEnv` does."""
    env = ControlEnv(env_id, num_envs=1)
    env.close()
    return env.spaces


class _LeanSyncVectorEnv(SyncVectorEnv):
    """Without the copies of observations and the merging of infos, half of what a step costs in fast environments."""

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        return vector_infos


class _EnvPool(VectorEnv):
    """envpool's own environments autoreset in NEXT_STEP mode. They take their seed when they are made, so a reset
    makes them anew."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, task: str, num_envs: int) -> None:
        try:
            self._envpool: Any = importlib.import_module("envpool")
        except ImportError as error:
            raise UserError(f"envpool:{task} needs envpool: pip install envpool ({error})") from error
        if task not in self._envpool.list_all_envs():
            raise unknown_name("envpool environment", task, self._envpool.list_all_envs())
        self.task, self.num_envs = task, num_envs
        self._pool = self._make(0)
        self.single_observation_space = self._pool.observation_space
        self.single_action_space = self._pool.action_space

    def _make(self, seed: int) -> Any:
        return self._envpool.make(self.task, env_type="gymnasium", num_envs=self.num_envs, seed=seed)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._pool.close()
        self._pool = self._make((seed or 0) % 2**31)
        return self._pool.reset()

    def step(self, actions: np.ndarray) -> Any:
        return self._pool.step(actions.astype(self.single_action_space.dtype))

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()


def _make(env_id: str, num_envs: int, render_mode: str | None) -> VectorEnv:
    scheme, _, task = env_id.rpartition(":")
    if scheme == "envpool":
        if render_mode:
            raise UserError(f"{env_id} cannot be filmed: envpool draws no pictures; give --env {task}")
        return _EnvPool(task, num_envs)
    options: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
    if scheme and (found := getattr(importlib.import_module(scheme), task, None)) is not None:
        return _LeanSyncVectorEnv([lambda: found(**options)] * num_envs, copy=False)
    if gymnasium.spec(task).vector_entry_point is not None and not render_mode:
        return gymnasium.make_vec(task, num_envs=num_envs)
    # The passive checker would look at each step; `check` looks at whole fragments.
    makers = [lambda: gymnasium.make(task, disable_env_checker=True, **options)] * num_envs
    return _LeanSyncVectorEnv(makers, copy=False)


@contextlib.contextmanager
def _refusals_named(env_id: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"environment {env_id} needs a package that is not installed: {_line(error)}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise unknown_name("environment", env_id, gymnasium.registry) from error
    except Exception as error:
        raise UserError(f"environment {env_id} cannot be made: {type(error).__name__}: {_line(error)}") from error


class _failures_named:
    """A class, since it stands around every step: half the cost of a generator."""

    def __init__(self, env_id: str, method: str) -> None:
        self.env_id, self.method = env_id, method

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(
                f"environment {self.env_id} failed in {self.method}(): {type(error).__name__}: {_line(error)}"
            ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
