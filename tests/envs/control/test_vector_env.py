import sys
import types
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from envs.control.spaces import BoxActions, DiscreteActions
from envs.control.vector_env import ControlEnv, control_spaces
from models.errors import UserError
from tests.envs.control import environments

HERE = "tests.envs.control.environments"


def test_its_own_vector_implementation_is_used_where_there_is_one() -> None:
    assert type(ControlEnv("CartPole-v1", 3).env).__name__ == "CartPoleVectorEnv"
    assert isinstance(ControlEnv("Acrobot-v1", 3).env, SyncVectorEnv)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", f"{HERE}:Counting-v0"])
def test_autoreset_gives_the_final_observation_and_then_a_dummy_step(env_id: str) -> None:
    env = ControlEnv(env_id, 2)
    env.reset(seed=0)
    dones = 0
    done = np.zeros(2, bool)
    for _ in range(1200):
        observations, rewards, terminated, truncated = env.step(np.zeros(2, np.int64))
        assert not (done & (terminated | truncated)).any()
        assert (rewards[done] == 0).all()
        if env_id.startswith("tests"):
            assert (observations[done] == 0).all()  # the first observation of the next episode
        done = terminated | truncated
        if env_id.startswith("tests"):
            assert (observations[done][:, 0] % 5 == 0).all()  # the last one of this
        dones += done.sum()
    assert dones >= 2


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "Pendulum-v1"])
def test_it_plays_as_gymnasium_does(env_id: str) -> None:
    ours, theirs = ControlEnv(env_id, 3), gymnasium.make_vec(env_id, num_envs=3)
    theirs.action_space.seed(0)
    np.testing.assert_array_equal(ours.reset(7), theirs.reset(seed=7)[0])
    for _ in range(210):
        actions = theirs.action_space.sample()
        for mine, other in zip(ours.step(actions), theirs.step(actions)):
            np.testing.assert_array_equal(mine, np.asarray(other, mine.dtype))


def test_spaces() -> None:
    cartpole = control_spaces("CartPole-v1")
    assert (cartpole.observation_size, cartpole.actions) == (4, DiscreteActions(2))
    assert control_spaces(f"{HERE}:Counting-v0").actions == DiscreteActions(3, first=1)
    pendulum = control_spaces("Pendulum-v1").actions
    assert isinstance(pendulum, BoxActions)
    assert (pendulum.low, pendulum.high, pendulum.shape) == (-2, 2, (1,))


def test_an_environment_by_its_import_path() -> None:
    env = ControlEnv(f"{HERE}:Dictionary", 2)  # it is not registered
    assert env.spaces.observation_size == 6 + 2 + 6 + 2
    env.reset(seed=0)
    observations, *_ = env.step(np.array([1, 1]))
    np.testing.assert_array_equal(observations[1], [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0])  # sorted by key


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPol-v1", "unknown environment `CartPol-v1`: did you mean `CartPole-v1`"),
        ("CartPole-v9", "did you mean `CartPole-v"),
        ("Nothing-v0", "unknown environment `Nothing-v0`"),
        ("no_such_module:CartPole-v1", "no_such_module"),
        ("Broken-v0", "cannot be made|needs a package"),
        (f"{HERE}:Unmakeable", "cannot be made: RuntimeError: no licence"),
        ("Image-v0", r"observes images, a Box of shape \(8, 8, 3\)"),
        (f"{HERE}:ManyActions", "takes actions from MultiDiscrete"),
        ("envpool:CartPole-v1", "pip install envpool"),
    ],
)
def test_refusals(env_id: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UserError, match=message) as caught:
        control_spaces(env_id)
    assert len(str(caught.value).splitlines()) == 1


def test_an_environment_that_raises_is_named() -> None:
    env = ControlEnv(f"{HERE}:Raising", 2)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.array([1, 1]))
    with pytest.raises(UserError, match=r"Raising failed in step\(\): ZeroDivisionError: division by zero"):
        env.step(np.array([1, 1]))


def test_a_lander_that_climbs_out_of_its_declared_space_plays_on() -> None:
    pytest.importorskip("Box2D")
    env = ControlEnv("LunarLander-v3", 4)
    observations = [env.reset(seed=0)]
    for _ in range(200):
        step = env.step(np.full(4, 2))  # the main engine
        observations.append(step[0])
    assert np.max(observations) > env.env.single_observation_space.high.max()
    env.check(np.stack(observations), step[1])
    with pytest.raises(UserError, match="not finite"):
        env.check(observations[0] * np.nan, step[1])


def test_gymnasium_is_asked_for_next_step_autoreset() -> None:
    gymnasium.register("OtherMode-v0", vector_entry_point=environments.SameStep)
    try:
        with pytest.raises(UserError, match="does not autoreset in NEXT_STEP mode"):
            ControlEnv("OtherMode-v0", 1)
    finally:
        gymnasium.registry.pop("OtherMode-v0")


class Pool:
    """Has envpool's interface: the seed goes to `make`, `reset` takes none, and actions must be int32."""

    observation_space, action_space = gymnasium.spaces.Box(0, 1e6, (1,)), gymnasium.spaces.Discrete(2)

    def __init__(self, task: str, env_type: str, num_envs: int, seed: int) -> None:
        assert (task, env_type) == ("Thing-v0", "gymnasium")
        assert 0 <= seed < 2**31  # a C int
        self.first = np.full((num_envs, 1), seed % 1000, np.float32)
        self.action_space = gymnasium.spaces.Discrete(2, dtype=np.int32)

    def reset(self) -> tuple[np.ndarray, dict]:
        return self.first, {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        assert actions.dtype == np.int32
        n = len(actions)
        return self.first + 1, np.ones(n, np.float32), np.zeros(n, bool), np.zeros(n, bool), {}

    def close(self) -> None: ...


def test_envpool_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("envpool")
    vars(module).update(make=Pool, list_all_envs=lambda: ["Thing-v0"])
    monkeypatch.setitem(sys.modules, "envpool", module)
    env = ControlEnv("envpool:Thing-v0", 3)
    first = env.reset(seed=2**62 + 5)
    np.testing.assert_array_equal(first, env.reset(seed=2**62 + 5))
    assert (first != env.reset(seed=2**62 + 6)).all()
    assert env.step(np.array([0, 1, 1]))[0].shape == (3, 1)
    with pytest.raises(UserError, match="unknown envpool environment `Thin-v0`: did you mean `Thing-v0`"):
        ControlEnv("envpool:Thin-v0", 3)
