import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agents.moments import Moments, Normalizer
from agents.rollout import RolloutConfig, RolloutWorker, Snapshot, join
from envs.control.spaces import DiscreteActions
from envs.control.vector_env import control_spaces
from models.control.policies import CategoricalPolicy, GaussianPolicy, Policy, StateDependentGaussianPolicy
from models.errors import UserError

HERE = "tests.envs.control.environments"
COUNTING = f"{HERE}:Counting-v0"


def worker(
    env_id: str = COUNTING, num_envs: int = 3, seed: int = 0, index: int = 0, step_timeout_s: float = 60.0
) -> tuple[RolloutWorker, Snapshot]:
    spaces = control_spaces(env_id)
    torch.manual_seed(0)
    policy: Policy
    if isinstance(spaces.actions, DiscreteActions):
        policy = CategoricalPolicy(spaces.observation_size, spaces.actions.count, (8,), "tanh")
    else:
        policy = GaussianPolicy(spaces.observation_size, spaces.actions.size, (8,), "tanh")
    with torch.no_grad():
        policy.net[-1].weight.mul_(100)  # a policy that depends on what it sees
    config = RolloutConfig(env_id, num_envs, policy.numpy_policy, seed, gamma=0.9, step_timeout_s=step_timeout_s)
    return RolloutWorker(config, index), Snapshot(0, policy.flat_weights())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Moments):
        return all(np.array_equal(value, vars(b)[name]) for name, value in vars(a).items())
    return all(
        equal(value, vars(b)[name]) if isinstance(value, Moments) else np.array_equal(value, vars(b)[name])
        for name, value in vars(a).items()
    )


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
    assert joined.versions.shape == (6,)
    assert joined.return_moments.count == joined.valid.sum()
    np.testing.assert_array_equal(joined.actions[:, 3:], fragments[1].actions)
    assert len(joined.episode_returns) == sum(len(fragment.episode_returns) for fragment in fragments)
    segment = joined.steps(8, 16)
    np.testing.assert_array_equal(segment.observations, joined.observations[8:17])
    np.testing.assert_array_equal(segment.rewards, joined.rewards[8:16])


@pytest.mark.parametrize("episodes", [0, 1, 5, 64, 100])
def test_evaluation_plays_that_many_whole_episodes_greedily(episodes: int) -> None:
    actor, snapshot = worker()
    returns, lengths = actor.evaluate(snapshot, episodes, seed=0, greedy=True, slice_s=60)
    assert returns.shape == lengths.shape == (episodes,)
    assert len(set(returns.tolist())) <= 1  # a deterministic environment and a greedy policy
    assert set(lengths.tolist()) <= {5}
    np.testing.assert_array_equal(returns, actor.evaluate(snapshot, episodes, seed=0, greedy=True, slice_s=60)[0])


def test_evaluation_may_sample() -> None:
    actor, snapshot = worker()
    flat = replace(snapshot, weights=snapshot.weights * 0)
    sampled, _ = actor.evaluate(flat, 50, seed=0, greedy=False, slice_s=60)
    assert len(set(sampled.tolist())) > 3
    np.testing.assert_array_equal(sampled, actor.evaluate(flat, 50, seed=0, greedy=False, slice_s=60)[0])
    assert (sampled != actor.evaluate(flat, 50, seed=1, greedy=False, slice_s=60)[0]).any()


def test_an_evaluation_in_slices_is_the_same_evaluation() -> None:
    actor, snapshot = worker("CartPole-v1")
    whole = actor.evaluate(snapshot, 10, seed=0, greedy=False, slice_s=60)
    for _ in range(whole[1].max()):
        sliced = actor.evaluate(snapshot, 10, seed=0, greedy=False, slice_s=1e-9)  # a slice is at least a step
        if sliced is not None:
            break
        assert actor.under_way is not None
    assert actor.under_way is None
    np.testing.assert_array_equal(sliced, whole)


def test_no_alarm_rings_between_two_slices() -> None:
    actor, snapshot = worker(step_timeout_s=0.2)
    assert actor.evaluate(snapshot, 3, seed=0, greedy=True, slice_s=1e-9) is None
    time.sleep(0.4)
    assert actor.evaluate(snapshot, 3, seed=0, greedy=True, slice_s=1e-9) is None


def test_an_evaluation_that_failed_is_not_gone_on_with() -> None:
    actor, snapshot = worker(f"{HERE}:Raising")
    for _ in range(2):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            actor.evaluate(snapshot, 1, 0, greedy=True, slice_s=60)


def test_evaluation_leaves_the_running_episodes_alone() -> None:
    (one, weights), (two, _) = worker("CartPole-v1"), worker("CartPole-v1")
    for actor in (one, two):
        actor.collect(weights, 9, 0, True)
    one.evaluate(weights, 10, seed=0, greedy=True, slice_s=60)
    assert equal(one.collect(weights, 9, 1, False), two.collect(weights, 9, 1, False))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Poisoned", "Poisoned returned an observation that is not finite"),
        ("Raising", r"Raising failed in step\(\): ZeroDivisionError"),
        ("Straying", "Straying returned an observation outside its space: number 0 is 4"),
        ("Hanging", "Hanging took more than 0.2 s over one step"),
    ],
)
def test_an_environment_that_misbehaves_is_named(name: str, message: str) -> None:
    actor, snapshot = worker(f"{HERE}:{name}", step_timeout_s=0.2)
    with pytest.raises(UserError, match=message):
        actor.collect(snapshot, 5, 0, True)
    with pytest.raises(UserError, match=message):
        actor.evaluate(snapshot, 1, 0, greedy=True, slice_s=60)


def test_the_limit_is_on_a_step_and_not_on_the_fragment(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, snapshot = worker(num_envs=1, step_timeout_s=0.5)
    step = actor.env.step

    def slow(actions: np.ndarray) -> Any:
        time.sleep(0.06)
        return step(actions)

    monkeypatch.setattr(actor.env, "step", slow)
    actor.collect(snapshot, 10, 0, True)


def test_gaussian_actions_are_kept_unclipped_and_clipped_for_the_environment() -> None:
    actor, snapshot = worker(f"{HERE}:Reaching", num_envs=4)  # which asserts that its actions are in bounds
    fragment = actor.collect(snapshot, 12, 0, True)
    assert fragment.actions.shape == (12, 4, 2)
    assert np.abs(fragment.actions[..., 0]).max() > 0.5
    clipped = np.clip(fragment.actions, [-0.5, -2], [0.5, 2])
    expected = -((clipped - fragment.observations[1:]) ** 2).sum(-1)
    np.testing.assert_allclose(fragment.rewards[fragment.valid], expected[fragment.valid], rtol=1e-5)
    policy = actor.config.policy(snapshot.weights)
    log_probs = policy.log_probs(policy(fragment.observations[:-1]), fragment.actions)
    np.testing.assert_allclose(fragment.log_probs, log_probs, atol=1e-5)


def test_state_dependent_noise_is_drawn_in_each_call_and_held_within_it() -> None:
    torch.manual_seed(0)
    env = f"{HERE}:Reaching"
    spaces = control_spaces(env)
    policy = StateDependentGaussianPolicy(spaces.observation_size, 2, (8,), "tanh", log_std=0.0, hold=4)
    config = RolloutConfig(env, 3, policy.numpy_policy, seed=0, gamma=0.9, step_timeout_s=60)
    actor, snapshot = RolloutWorker(config), Snapshot(0, policy.flat_weights())
    drawn = []
    for round in (0, 1):
        fragment = actor.collect(snapshot, 8, round, restart=round == 0)
        observations = torch.from_numpy(fragment.observations[:-1])
        pi = policy(observations)
        expected = pi.log_prob(torch.from_numpy(fragment.actions)).detach()
        np.testing.assert_allclose(fragment.log_probs, expected, atol=1e-5)
        noise = fragment.actions - pi.mean.detach().numpy()  # the goal that is observed stays in an episode
        np.testing.assert_allclose(noise[1:4], np.broadcast_to(noise[0], (3, 3, 2)), atol=1e-5)
        assert (np.abs(noise[4] - noise[0]) > 1e-3).all()
        drawn.append(noise[0])
    assert (drawn[0] != drawn[1]).all()
    returns, _ = actor.evaluate(snapshot, 5, seed=0, greedy=False, slice_s=60)
    np.testing.assert_array_equal(returns, actor.evaluate(snapshot, 5, seed=0, greedy=False, slice_s=60)[0])


def test_the_policy_sees_observations_normalised_by_the_snapshot_and_the_fragment_holds_them_raw() -> None:
    (actor, snapshot), (plain, _) = worker(), worker()
    normalizer = Normalizer(np.array([2.0, 1.0], np.float32), np.array([3.0, 0.5], np.float32))
    fragment = actor.collect(replace(snapshot, normalizer=normalizer), 20, 0, True)
    steps = fragment.observations[:, 0, 0]
    np.testing.assert_array_equal(steps, ([0, 1, 2, 3, 4, 5] * 4)[:21])
    policy = actor.config.policy(snapshot.weights)
    log_probs = policy.log_probs(policy(normalizer(fragment.observations[:-1])), fragment.actions)
    np.testing.assert_allclose(fragment.log_probs, log_probs, atol=1e-5)
    assert fragment.observation_moments.count == fragment.valid.sum()
    assert fragment.observation_moments.mean[0] == pytest.approx(steps[:-1][fragment.valid[:, 0]].mean())
    assert plain.collect(snapshot, 20, 0, True).observation_moments.count == 0


def test_discounted_returns_are_counted_over_each_episode() -> None:
    (actor, snapshot), expected = worker(), []
    sums = np.zeros(3)
    for fragment in (actor.collect(snapshot, 7, 0, True), actor.collect(snapshot, 8, 1, False)):
        counted = []
        for t in range(len(fragment.rewards)):
            sums = 0.9 * sums + fragment.rewards[t]
            counted += sums[fragment.valid[t]].tolist()
            sums[fragment.terminated[t] | fragment.truncated[t]] = 0
        expected.append((fragment.return_moments, counted))
    for moments, counted in expected:
        assert moments.count == len(counted)
        assert moments.mean == pytest.approx(np.mean(counted))
        assert moments.m2 == pytest.approx(np.var(counted) * len(counted), rel=1e-4)
