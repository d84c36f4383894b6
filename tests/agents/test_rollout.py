from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from agents.rollout import ATTEMPTS, NumpyMLP, RolloutWorker, call_each, join, sample
from envs.control.vector_env import control_spaces
from models.control.actor_critic import ActorCritic
from models.errors import UserError

COUNTING = "tests.envs.control.environments:Counting-v0"


def worker(
    env_id: str = COUNTING, num_envs: int = 3, seed: int = 0, index: int = 0
) -> tuple[RolloutWorker, np.ndarray]:
    spaces = control_spaces(env_id)
    torch.manual_seed(0)
    net = ActorCritic(spaces.observation_size, spaces.actions, (8,))
    with torch.no_grad():
        net.actor[-1].weight.mul_(100)  # a policy that depends on what it sees
    weights = parameters_to_vector(net.actor.parameters()).detach().numpy()
    return RolloutWorker(env_id, num_envs, spaces, (8,), seed, index), weights


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(value, vars(b)[name]) for name, value in vars(a).items())


def test_the_numpy_policy_is_the_torch_policy() -> None:
    torch.manual_seed(1)
    net = ActorCritic(observation_size=5, actions=3, hidden=(16, 8))
    with torch.no_grad():
        net.actor[-1].weight.mul_(100)
    weights = parameters_to_vector(net.actor.parameters()).detach().numpy()
    observations = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    logits = NumpyMLP([5, 16, 8, 3], weights)(observations)
    np.testing.assert_allclose(logits, net.actor(torch.from_numpy(observations)).detach().numpy(), atol=1e-5)
    actions, log_probs = sample(logits, np.random.default_rng(0))
    expected = net.log_probs(torch.from_numpy(observations)).detach().numpy()[np.arange(40), actions]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    with pytest.raises(ValueError, match="weights for layers"):
        NumpyMLP([5, 16, 3], weights)


def test_actions_are_drawn_with_the_probabilities_of_the_policy() -> None:
    probabilities = np.array([0.7, 0.2, 0.1], np.float32)
    logits = np.tile(np.log(probabilities), (100_000, 1)) + 3
    actions, _ = sample(logits, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(actions) / 100_000, probabilities, atol=0.01)


def test_a_fragment_masks_dummy_steps_and_keeps_final_observations() -> None:
    actor, weights = worker()
    fragment = actor.collect(weights, steps=20, round=0, restart=True)
    steps = fragment.observations[:, :, 0]
    np.testing.assert_array_equal(steps[:, 0], [0, 1, 2, 3, 4, 5] * 3 + [0, 1, 2])  # 5 is the final observation
    valid = np.array(([True] * 5 + [False]) * 3 + [True] * 2)
    np.testing.assert_array_equal(fragment.valid, np.tile(valid[:, None], 3))
    np.testing.assert_array_equal(fragment.terminated | fragment.truncated, steps[1:] == 5)
    np.testing.assert_array_equal(fragment.rewards, np.where(fragment.valid, fragment.actions + 1, 0))
    last_actions = fragment.actions[fragment.terminated]
    assert (last_actions == 0).all()  # this environment ends by itself after its action 1, which is our action 0
    returns = fragment.rewards[:18].reshape(3, 6, 3).sum(1).ravel()
    np.testing.assert_array_equal(fragment.episode_returns, returns)


def test_fragments_go_on_where_the_last_one_stopped() -> None:
    (one, weights), (two, _) = worker(), worker()
    one.collect(weights, 7, round=0, restart=True)
    two.collect(weights, 7, round=0, restart=True)
    first, second = one.collect(weights, 8, round=1, restart=False), two.collect(weights, 8, round=1, restart=False)
    assert equal(first, second)
    # After 7 steps: 5 of the first episode, the dummy, 1 of the second.
    np.testing.assert_array_equal(first.observations[:, 0, 0], [1, 2, 3, 4, 5, 0, 1, 2, 3])
    np.testing.assert_array_equal(first.valid[:, 0], [True] * 4 + [False] + [True] * 3)
    assert len(first.episode_returns) == 3


def test_a_dummy_step_at_the_beginning_of_a_fragment_is_masked() -> None:
    actor, weights = worker()
    assert actor.collect(weights, 5, round=0, restart=True).valid.all()
    assert actor.collect(weights, 3, round=1, restart=False).valid.tolist() == [[False] * 3, [True] * 3, [True] * 3]


def test_a_restart_depends_on_nothing_that_came_before() -> None:
    (old, weights), (fresh, _) = worker("CartPole-v1"), worker("CartPole-v1")
    for round in range(3):
        old.collect(weights, 11, round, restart=round == 0)
    assert equal(old.collect(weights, 30, 3, restart=True), fresh.collect(weights, 30, 3, restart=True))
    replaced, _ = worker("CartPole-v1")
    assert equal(
        replaced.collect(weights, 30, 3, restart=False), worker("CartPole-v1")[0].collect(weights, 30, 3, True)
    )


def test_workers_and_rounds_draw_different_numbers() -> None:
    weights = worker("CartPole-v1")[1]
    fragments = [
        worker("CartPole-v1", index=index)[0].collect(weights, 10, round, restart=True)
        for index, round in [(0, 0), (1, 0), (0, 1)]
    ]
    assert len({fragment.observations[0].tobytes() for fragment in fragments}) == 3
    assert len({fragment.actions.tobytes() for fragment in fragments}) == 3


def test_join_and_cut() -> None:
    fragments = []
    for index in range(2):
        actor, weights = worker("CartPole-v1", num_envs=3, index=index)
        fragments.append(actor.collect(weights, 40, 0, True))
    joined = join(fragments)
    assert joined.observations.shape == (41, 6, 4)
    np.testing.assert_array_equal(joined.actions[:, 3:], fragments[1].actions)
    assert len(joined.episode_returns) == sum(len(fragment.episode_returns) for fragment in fragments)
    segment = joined.steps(8, 16)
    np.testing.assert_array_equal(segment.observations, joined.observations[8:17])
    np.testing.assert_array_equal(segment.rewards, joined.rewards[8:16])


@pytest.mark.parametrize("episodes", [0, 1, 5, 64, 100])
def test_evaluation_plays_that_many_whole_episodes_greedily(episodes: int) -> None:
    actor, weights = worker()
    returns = actor.evaluate(weights, episodes, seed=0)
    assert returns.shape == (episodes,)
    assert len(set(returns.tolist())) <= 1  # a deterministic environment and a greedy policy
    np.testing.assert_array_equal(returns, actor.evaluate(weights, episodes, seed=0))


def test_evaluation_leaves_the_running_episodes_alone() -> None:
    (one, weights), (two, _) = worker("CartPole-v1"), worker("CartPole-v1")
    for actor in (one, two):
        actor.collect(weights, 9, 0, True)
    one.evaluate(weights, 10, seed=0)
    assert equal(one.collect(weights, 9, 1, False), two.collect(weights, 9, 1, False))


def test_an_environment_that_returns_nan_is_named() -> None:
    actor, weights = worker("tests.envs.control.environments:Poisoned-v0")
    with pytest.raises(UserError, match="Poisoned-v0 returned an observation that is not finite"):
        actor.collect(weights, 5, 0, True)


class DyingGroup:
    """Worker 1 dies at its first `deaths` calls."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.calls: list[int] = []

    def __len__(self) -> int:
        return 3

    def call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> "Future[Any]":
        self.calls.append(index)
        future: Future[Any] = Future()
        if index == 1 and self.calls.count(1) <= self.deaths:
            future.set_exception(ConnectionError("rollout-1 died"))
        else:
            future.set_result((method, index, *args))
        return future


def test_a_lost_call_is_made_again_and_results_keep_their_order() -> None:
    group: Any = DyingGroup(deaths=2)
    results = call_each(group, "collect", [("a",), ("b",), ("c",)], timeout_s=1)
    assert results == [("collect", 0, "a"), ("collect", 1, "b"), ("collect", 2, "c")]
    assert group.calls == [0, 1, 2, 1, 1]


def test_a_worker_that_dies_every_time_is_given_up() -> None:
    group: Any = DyingGroup(deaths=100)
    with pytest.raises(ConnectionError, match="rollout-1 died"):
        call_each(group, "collect", [()] * 3, timeout_s=1)
    assert group.calls.count(1) == ATTEMPTS
