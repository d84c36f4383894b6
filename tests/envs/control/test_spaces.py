import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

from envs.control.spaces import BoxActions, DiscreteActions, action_kind, flattener, refuse_strange
from models.errors import UserError

SPACES = [
    Box(-1, 1, (3,), np.float32),
    Box(-1, 1, (2, 3), np.float64),
    Discrete(4),
    Discrete(3, start=-1),
    MultiBinary(3),
    MultiDiscrete([2, 3]),
    MultiDiscrete([[2, 3], [4, 2]]),
    Tuple((Discrete(2), Box(0, 5, (2,)))),
    Dict({"b": Box(0, 1, (2,)), "a": Dict({"x": Discrete(3), "y": MultiBinary((2, 2))}), "c": Tuple((Discrete(2),))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_batch_is_flattened_as_gymnasium_flattens_its_items(space: gymnasium.Space) -> None:
    space.seed(0)
    items = [space.sample() for _ in range(5)]
    batch = gymnasium.vector.utils.concatenate(space, items, gymnasium.vector.utils.create_empty_array(space, 5))
    flatten, low, high = flattener(space, "X-v0")
    vectors = flatten(batch)
    expected = np.stack([gymnasium.spaces.flatten(space, item) for item in items])
    np.testing.assert_allclose(vectors, expected)
    assert vectors.shape == (5, len(low)) == (5, len(high))
    assert (vectors >= low).all()
    assert (vectors <= high).all()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(0, 255, (8, 8, 3), np.uint8), r"X-v0 observes images, a Box of shape \(8, 8, 3\)"),
        (Dict({"camera": Box(0, 255, (8, 8), np.uint8)}), "observes images"),
        (Text(5), "observes a Text"),
        (Tuple((Discrete(2), Sequence(Discrete(2)))), "observes a Sequence"),
    ],
)
def test_spaces_that_are_not_served_are_named(space: gymnasium.Space, message: str) -> None:
    with pytest.raises(UserError, match=message):
        flattener(space, "X-v0")


def test_discrete_actions_begin_where_the_environment_says() -> None:
    actions = action_kind(Discrete(3, start=-1), "X-v0")
    assert actions == DiscreteActions(3, -1)
    np.testing.assert_array_equal(actions.to_env(np.array([0, 2])), [-1, 1])


def test_box_actions_are_clipped_or_stretched_to_the_bounds() -> None:
    actions = action_kind(Box(np.float32([[-1, 0]]), np.float32([[3, 1]])), "X-v0")
    assert isinstance(actions, BoxActions)
    assert actions.size == 2
    np.testing.assert_allclose(actions.to_env(np.array([[-5.0, 0.5], [2.0, 9.0]])), [[[-1, 0.5]], [[2, 1]]])
    np.testing.assert_allclose(actions.from_unit(np.array([[-1.0, 0.0], [0.5, 1.0]])), [[-1, 0.5], [2, 1]])


@pytest.mark.parametrize("space", [MultiDiscrete([2, 2]), MultiBinary(2), Box(0, 5, (1,), np.int64)])
def test_action_spaces_that_no_algorithm_serves(space: gymnasium.Space) -> None:
    with pytest.raises(UserError, match=r"X-v0 takes actions from .*: only Discrete and floating-point Box"):
        action_kind(space, "X-v0")


def test_strange_observations_are_named() -> None:
    low, high = np.array([-1.0, -np.inf]), np.array([1.0, 4.0])
    refuse_strange(np.array([[1.0005, -1e30], [-1.0, 4.0]]), low, high, "X-v0")  # rounding is forgiven
    for bad, message in [
        ([np.nan, 0], "X-v0 returned an observation that is not finite"),
        ([0, -np.inf], "not finite"),
        ([-1.1, 0], "outside its space: number 0 is -1.1, and its observation_space allows -1 to 1"),
        ([0, 5], "number 1 is 5"),
    ]:
        with pytest.raises(UserError, match=message):
            refuse_strange(np.array([[0.0, 0.0], bad]), low, high, "X-v0")
