import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from envs.control.vector_env import ControlSpaces, as_vectors, control_spaces, make_vector_env
from models.errors import UserError
from tests.envs.control import environments


def test_its_own_vector_implementation_is_used_where_there_is_one() -> None:
    assert type(make_vector_env("CartPole-v1", 3)).__name__ == "CartPoleVectorEnv"
    assert isinstance(make_vector_env("Acrobot-v1", 3), SyncVectorEnv)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "tests.envs.control.environments:Counting-v0"])
def test_autoreset_gives_the_final_observation_and_then_a_dummy_step(env_id: str) -> None:
    env = make_vector_env(env_id, 2)
    env.reset(seed=0)
    dones = 0
    done = np.zeros(2, bool)
    for _ in range(1200):
        observations, rewards, terminated, truncated, _ = env.step(np.zeros(2, np.int64))
        assert not (done & (terminated | truncated)).any()
        assert (rewards[done] == 0).all()
        if env_id.startswith("tests"):
            assert (observations[done] == 0).all()  # the first observation of the next episode
        done = terminated | truncated
        if env_id.startswith("tests"):
            assert (observations[done][:, 0] % 5 == 0).all()  # the last one of this
        dones += done.sum()
    assert dones >= 2


def test_spaces() -> None:
    assert control_spaces("CartPole-v1") == ControlSpaces(observation_size=4, actions=2)
    assert control_spaces("tests.envs.control.environments:Counting-v0") == ControlSpaces(2, 3, first_action=1)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPol-v1", "unknown environment `CartPol-v1`: did you mean `CartPole-v1`"),
        ("CartPole-v9", "did you mean `CartPole-v"),
        ("Nothing-v0", "unknown environment `Nothing-v0`"),
        ("no_such_module:CartPole-v1", "no_such_module"),
        ("Pendulum-v1", "takes actions from Box of shape .1,.: only Discrete"),
        ("Broken-v0", "cannot be made|needs a package"),
        ("Dictionary-v0", "observes Dict: only vectors"),
        ("Image-v0", r"observes Box of shape \(8, 8, 3\): only vectors"),
        ("FrozenLake-v1", "observes Discrete: only vectors"),
    ],
)
def test_refusals(env_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        control_spaces(env_id)
    assert len(str(caught.value).splitlines()) == 1


def test_observations_that_are_not_finite_are_refused() -> None:
    assert as_vectors(np.ones((2, 3)), "X-v0").dtype == np.float32
    with pytest.raises(UserError, match="X-v0 returned an observation that is not finite"):
        as_vectors(np.array([[0.0, 1.0], [np.nan, 0.0]]), "X-v0")


def test_gymnasium_is_asked_for_next_step_autoreset() -> None:
    gymnasium.register("OtherMode-v0", vector_entry_point=environments.SameStep)
    try:
        with pytest.raises(UserError, match="does not autoreset in NEXT_STEP mode"):
            make_vector_env("OtherMode-v0", 1)
    finally:
        gymnasium.registry.pop("OtherMode-v0")
