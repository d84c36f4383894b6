import threading
from concurrent.futures import Future
from typing import Any

import pytest

from agents.pipeline import ATTEMPTS, Pipeline, call_each
from models.errors import UserError


class Group:
    """Workers whose calls return when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple, Future]] = []

    def call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> "Future[Any]":
        assert (method, timeout_s) == ("collect", 3.0)
        self.calls.append((index, args, Future()))
        return self.calls[-1][2]

    def answer(self, number: int) -> None:
        worker, args, future = self.calls[number]
        future.set_result((worker, *args))

    def die(self, number: int) -> None:
        self.calls[number][2].set_exception(ConnectionError("killed"))


def pipeline(ahead: int) -> tuple[Pipeline, Group]:
    group = Group()
    made: Any = Pipeline(group, "collect", 3.0, ahead)  # type: ignore[arg-type]
    for worker, call in [(0, "a"), (1, "b"), (0, "c")]:
        made.issue(worker, call)
    return made, group


def test_in_order_results_come_as_they_were_asked_for() -> None:
    calls, group = pipeline(ahead=0)
    for number in (2, 1, 0):
        group.answer(number)
    assert [calls.next() for _ in range(3)] == [(0, (0, "a")), (1, (1, "b")), (0, (0, "c"))]
    assert not calls


def test_otherwise_whatever_is_ready_comes_and_the_longest_asked_for_first() -> None:
    calls, group = pipeline(ahead=2)
    group.answer(1)
    assert calls.next() == (1, (1, "b"))
    group.answer(2)
    group.answer(0)
    assert [calls.next() for _ in range(2)] == [(0, (0, "a")), (0, (0, "c"))]


def test_a_worker_s_results_come_in_their_order_however_they_are_reported() -> None:
    """Ray now and then reports the second of two before the first."""
    calls, group = pipeline(ahead=2)
    group.answer(2)
    threading.Timer(0.2, group.answer, (0,)).start()
    assert calls.next() == (0, (0, "a"))
    assert calls.next() == (0, (0, "c"))
    group.answer(1)
    assert calls.next() == (1, (1, "b"))


def test_a_slow_worker_s_result_is_overtaken_by_so_many_and_no_more() -> None:
    """Two calls of each worker in line; those of worker 0 take as long as everything else together."""
    for ahead in (0, 1, 4):
        group = Group()
        calls: Any = Pipeline(group, "collect", 3.0, ahead)  # type: ignore[arg-type]
        learnt, lags = 0, []
        for worker in (0, 1, 0, 1):
            calls.issue(worker, learnt)
        for _ in range(200):
            waiting = [i for i, (_, _, future) in enumerate(group.calls) if not future.done()]
            allowed = waiting[0] + ahead  # in the order of issue
            quick = [i for i in waiting if group.calls[i][0] == 1 and i <= allowed]
            group.answer(quick[0] if quick else waiting[0])
            worker, (_, issued_at) = calls.next()
            lags.append(learnt - issued_at)
            learnt += 1
            calls.issue(worker, learnt)
        assert ahead < max(lags) <= ahead + 4 - 1


def test_a_result_that_is_too_early_waits_for_the_oldest() -> None:
    calls, group = pipeline(ahead=1)
    group.answer(2)
    assert not calls.calls[0].future.done()
    threading.Timer(0.2, group.answer, (0,)).start()
    assert calls.next() == (0, (0, "a"))
    assert calls.next() == (0, (0, "c"))


@pytest.mark.parametrize("ahead", [0, 2])
def test_calls_of_a_worker_that_died_are_issued_again_in_their_order(ahead: int) -> None:
    calls, group = pipeline(ahead)
    group.die(0)
    group.die(2)
    group.answer(1)
    answered = 0

    def answer_what_was_issued_again(index: int, method: str, *args: Any, timeout_s: float | None = None) -> Future:
        nonlocal answered
        answered += 1
        future: Future = Future()
        future.set_result(("again", index, *args))
        return future

    group.call = answer_what_was_issued_again  # type: ignore[method-assign]
    found = [calls.next() for _ in range(3)]
    assert answered == 2
    assert [result for worker, result in found if worker == 0] == [("again", 0, "a"), ("again", 0, "c")]
    assert (1, (1, "b")) in found


def test_a_call_that_kills_every_worker_ends_the_run() -> None:
    calls, group = pipeline(ahead=0)

    def die(index: int, method: str, *args: Any, timeout_s: float | None = None) -> Future:
        group.calls.append((index, args, Future()))
        group.die(-1)
        return group.calls[-1][2]

    group.call = die  # type: ignore[method-assign]
    group.die(0)
    with pytest.raises(
        UserError, match=r"died one after another of the same collect\(\): killed; .*--worker-timeout-s 3"
    ):
        calls.next()
    assert len(group.calls) == 3 + ATTEMPTS - 1


def test_an_error_of_the_worker_is_passed_on() -> None:
    calls, group = pipeline(ahead=0)
    group.calls[0][2].set_exception(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        calls.next()


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
    with pytest.raises(UserError, match=r"same collect\(\): rollout-1 died; .* --worker-timeout-s 1$"):
        call_each(group, "collect", [()] * 3, timeout_s=1)
    assert group.calls.count(1) == ATTEMPTS


def test_what_is_not_done_yet_is_called_again_and_deaths_are_counted_over_all_of_it() -> None:
    """Worker 1 stops twice on the way, and dies at each third call: its replacement begins anew, and ends like it."""

    class Group(DyingGroup):
        def call(self, index: int, method: str, *args: Any, timeout_s: float | None = None) -> "Future[Any]":
            self.calls.append(index)
            future: Future[Any] = Future()
            if index == 1 and self.calls.count(1) % 3 == 0 and self.calls.count(1) <= 3 * self.deaths:
                future.set_exception(ConnectionError("rollout-1 died"))
            else:
                future.set_result(None if index == 1 and self.calls.count(1) <= 3 * self.deaths else index)
            return future

    group: Any = Group(deaths=2)
    assert call_each(group, "evaluate", [()] * 3, timeout_s=1) == [0, 1, 2]
    assert group.calls.count(1) == 7
    group = Group(deaths=100)
    with pytest.raises(UserError, match="rollout-1 died"):
        call_each(group, "evaluate", [()] * 3, timeout_s=1)
    assert group.calls.count(1) == 3 * ATTEMPTS


def test_fewer_arguments_than_workers_call_the_first_ones() -> None:
    group: Any = DyingGroup(deaths=0)
    assert call_each(group, "film", [("a",)], timeout_s=1) == [("film", 0, "a")]
    assert group.calls == [0]
