"""Against sums over whole episodes, written as they are defined."""

from collections.abc import Iterator

import numpy as np
import pytest

from agents.experience import ExperienceWorker
from agents.n_step import NStep
from agents.rollout import RolloutConfig, Snapshot
from models.control.q_networks import DeterministicActor
from tests.agents.test_experience import worker

GAMMA, R = 0.9, 3  # observations of two numbers, one action
N, LENGTH = 2, 60


def play(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-step rows whose observations count through their environment's time, with a dummy after each episode."""
    done, terminated = rng.random((LENGTH, N)) < 0.2, rng.random((LENGTH, N)) < 0.5
    valid = np.ones((LENGTH, N), bool)
    for t in range(1, LENGTH):
        valid[t] = ~(done[t - 1] & valid[t - 1])
    done &= valid
    rows = np.zeros((LENGTH, N, 7), np.float32)
    rows[..., 0] = np.arange(LENGTH)[:, None]
    rows[..., 1] = rows[..., 6] = np.arange(N)
    rows[..., 2] = rng.random((LENGTH, N))
    rows[..., R] = rng.standard_normal((LENGTH, N))
    rows[..., R + 1] = GAMMA * ~(done & terminated)
    rows[..., R + 2] = rows[..., 0] + 1
    return rows, done, valid


def by_definition(n: int, rows: np.ndarray, done: np.ndarray, valid: np.ndarray) -> Iterator[list[float]]:
    for t in range(LENGTH - n + 1):
        for i in range(N):
            if not valid[t, i]:
                continue
            until = next((e for e in range(t, t + n - 1) if done[e, i]), t + n - 1)
            m = until - t + 1
            total = sum(GAMMA**k * rows[t + k, i, R] for k in range(m))
            discount = GAMMA**m if rows[until, i, R + 1] > 0 else 0.0
            yield [*rows[t, i, :R], total, discount, until + 1, i]


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("fragment", [5, 12, 60])
def test_rows_are_the_sums_however_they_are_cut(n: int, fragment: int) -> None:
    rows, done, valid = play(np.random.default_rng(n))
    join = NStep(n, GAMMA, R)
    cuts = [slice(at, at + fragment) for at in range(0, LENGTH, fragment)]
    joined = np.concatenate([join(rows[cut], done[cut], valid[cut]) for cut in cuts])
    assert done.any(), "no episode ended"
    np.testing.assert_allclose(joined, np.array(list(by_definition(n, rows, done, valid))), rtol=1e-6, atol=1e-6)


def test_one_step_is_what_was_played_bit_for_bit() -> None:
    rows, done, valid = play(np.random.default_rng(0))
    np.testing.assert_array_equal(NStep(1, GAMMA, R)(rows, done, valid), rows[valid])


def test_a_restart_forgets_rows_that_are_not_complete() -> None:
    rows, done, valid = play(np.random.default_rng(0))
    join = NStep(3, GAMMA, R)
    first = join(rows, done, valid)
    join.restart()
    np.testing.assert_array_equal(join(rows, done, valid), first)


def test_a_worker_counts_steps_and_not_rows() -> None:
    one, snapshot = worker()
    actor = DeterministicActor(2, 1, (8,), "relu", 0.3)
    config = RolloutConfig("tests.agents.test_experience:Known", 3, actor.numpy_policy, 0, 0.9, 60.0, n_step=3)
    three = ExperienceWorker(config, actor_index=1)
    counts = []
    for played in (w.experience(Snapshot(7, snapshot.weights), 10, 0, restart=True) for w in (one, three)):
        counts.append((played.steps, len(played.rows)))
    assert counts == [(24, 24), (24, 21)]  # of ten steps two are dummies, and the row of one is not complete
