"""Supervision of actors: what a death, a hang or an error of one of them does to calls, state and neighbours."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from launch.ray_backend import RayBackend
from launch.ray_group import RayGroup
from launch.run import ActorDied, CallTimedOut
from tests.launch.actors import Counter, OnceOnly, Picky
from tests.launch.processes import is_gone

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]
LIMIT = 60  # seconds; nothing here takes that long unless it hangs

Start = Callable[..., RayGroup]


@pytest.fixture
def start(ray_backend: RayBackend) -> Iterator[Start]:
    groups = []

    def start_group(cls: type, count: int, *args: Any, name: str = "counter", **kwargs: Any) -> RayGroup:
        groups.append(ray_backend.actors(cls, count, {"cpu": 1}, args, kwargs, name))
        return groups[-1]

    yield start_group
    for group in groups:
        group.close()


def pid(group: RayGroup, index: int) -> int:
    return group.call(index, "whereabouts").result(LIMIT)["pid"]


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(LIMIT) for future in futures]


def wait_until_it_sleeps(group: RayGroup, index: int) -> None:
    log = group._actors[index].log
    deadline = time.monotonic() + LIMIT
    while "asleep" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_actors_are_processes_with_their_arguments_threads_and_log(start: Start) -> None:
    group = start(Counter, 2, base=7)
    assert len(group) == 2
    here = results(group.broadcast("whereabouts"))
    assert [(actor["index"], actor["base"], actor["threads"]) for actor in here] == [(0, 7, "1"), (1, 7, "1")]
    assert len({os.getpid(), *(actor["pid"] for actor in here)}) == 3
    group.call(1, "sleep", 0.0).result(LIMIT)
    assert "asleep for 0.0 s" in group._actors[1].log.read_text()
    assert "asleep" not in group._actors[0].log.read_text()


def test_calls_keep_their_order_and_arrays_are_shared(start: Start, ray_backend: RayBackend) -> None:
    group = start(Counter, 2)
    futures = [group.call(0, "note", i) for i in range(50)]
    futures[-1].result(LIMIT)
    assert [future.result()[-1] for future in futures] == list(range(50))

    array = np.arange(300_000, dtype=np.float64)
    shared = ray_backend.share(array)
    total, writeable = group.call(0, "total", shared).result(LIMIT)
    assert (total, writeable) == (array.sum(), False)
    assert group.call(1, "total", array=shared).result(LIMIT)[0] == array.sum()
    assert np.array_equal(shared.get(), array)

    kept = group.call(0, "array", 300_000, share_result=True).result(LIMIT)
    assert group.call(1, "total", kept).result(LIMIT) == (array.sum(), False)
    assert np.array_equal(kept.get(), array)


def test_an_error_keeps_its_type_and_the_actor_lives_on(start: Start) -> None:
    group = start(Counter, 1)
    before = pid(group, 0)
    for options in ({}, {"share_result": True}):
        with pytest.raises(LookupError, match="no such thing") as caught:
            group.call(0, "refuse", **options).result(LIMIT)
        assert type(caught.value) is LookupError
        assert any("in refuse" in note for note in caught.value.__notes__), "the actor's traceback is in a note"
    with pytest.raises(AttributeError, match="no_such_method"):
        group.call(0, "no_such_method").result(LIMIT)
    assert pid(group, 0) == before
    assert group.restarts == 0


def test_a_constructor_s_error_is_raised_as_it_is(start: Start) -> None:
    with pytest.raises(LookupError, match="not with these arguments") as caught:
        start(Picky, 2)
    assert type(caught.value) is LookupError


def test_a_killed_actor_is_replaced_with_its_state_and_its_neighbour_notices_nothing(
    start: Start, ray_backend: RayBackend, announcements: list[str]
) -> None:
    group = start(Counter, 2)
    old, other = pid(group, 0), pid(group, 1)
    for weights in (np.ones(1000), np.full(1000, 2.0)):
        results(group.broadcast("load", ray_backend.share(weights), sticky=True))
    results(group.broadcast("scale", 0.5, sticky=True))
    results(group.broadcast("note", "forgotten"))

    lost = group.call(0, "sleep", 600)
    behind = group.call(0, "held")
    unharmed = group.call(1, "sleep", 0.5)
    wait_until_it_sleeps(group, 0)
    os.kill(old, signal.SIGKILL)

    for future in (lost, behind):
        with pytest.raises(ConnectionError) as caught:
            future.result(LIMIT)
        assert isinstance(caught.value, ActorDied)
        text = str(caught.value)
        assert "counter-0 died during sleep: ended without a word" in text
        assert "SIGKILL" in text
        assert "asleep for 600 s" in text, "the last lines of the log are told"
    assert group.call(0, "held").result(LIMIT) == 1000.0, "the latest sticky calls are repeated, in their order"
    assert group.call(0, "note", "first").result(LIMIT) == ["first"], "other calls are not"
    assert pid(group, 0) != old
    assert group.restarts == 1
    assert announcements[-1].startswith("counter-0 died: ended without a word")
    assert unharmed.result(LIMIT) == 0.5
    assert pid(group, 1) == other


@pytest.mark.parametrize(
    ("call", "cause"), [(("crash",), "crashed: Segmentation fault"), (("leave", 3), "ended itself with exit code 3")]
)
def test_the_cause_of_death_is_named(start: Start, call: tuple[Any, ...], cause: str) -> None:
    group = start(Counter, 1, name=call[0])
    with pytest.raises(ActorDied, match=re.escape(f"{call[0]}-0 died during {call[0]}: {cause}")):
        group.call(0, *call).result(LIMIT)
    pid(group, 0)
    assert group.restarts == 1


def test_a_call_past_its_limit_ends_the_actor_but_waiting_in_line_does_not_count(start: Start) -> None:
    group = start(Counter, 1)
    old = psutil.Process(pid(group, 0))
    patient = [group.call(0, "sleep", 0.5, timeout_s=2.5) for _ in range(6)]
    assert results(patient) == [0.5] * 6
    hanging = group.call(0, "sleep", 600, timeout_s=0.5)
    behind = group.call(0, "sleep", 0.1, timeout_s=600)
    with pytest.raises(CallTimedOut, match=r"sleep ran past its limit of 0\.5 s") as caught:
        hanging.result(LIMIT)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(ActorDied) as lost:
        behind.result(LIMIT)
    assert not isinstance(lost.value, TimeoutError), "its own time had not begun"
    assert is_gone(old)
    assert pid(group, 0) != old.pid
    assert group.restarts == 1


def test_a_stopped_process_is_ended_too(start: Start) -> None:
    group = start(Counter, 1)
    old = psutil.Process(pid(group, 0))
    old.suspend()
    with pytest.raises(ActorDied, match="ran past its limit"):
        group.call(0, "note", 1, timeout_s=0.5).result(LIMIT)
    assert is_gone(old)
    assert group.call(0, "note", 1).result(LIMIT) == [1]


def test_an_actor_that_dies_whenever_it_starts_is_given_up(start: Start, tmp_path: Path) -> None:
    group = start(OnceOnly, 1, tmp_path / "marker", name="once")
    os.kill(group.call(0, "pid").result(LIMIT), signal.SIGKILL)
    deaths = []
    while not deaths or "gave up" not in deaths[-1]:
        with pytest.raises(ActorDied) as caught:
            group.call(0, "pid").result(LIMIT)
        deaths.append(str(caught.value))
    assert "gave up once-0, starts failed: 3. once-0 died during" in deaths[-1]
    with pytest.raises(ActorDied, match="gave up"):
        group.call(0, "pid").result(LIMIT)


def test_an_actor_that_cannot_start_at_all_is_an_error_of_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    with pytest.raises(ActorDied, match="gave up once-0, starts failed: 3"):
        start(OnceOnly, 1, tmp_path / "marker", name="once")


def test_children_of_an_actor_do_not_outlive_it(start: Start) -> None:
    group = start(Counter, 1)
    child = psutil.Process(group.call(0, "fork").result(LIMIT))
    os.kill(pid(group, 0), signal.SIGKILL)
    assert is_gone(child)


def test_closing_ends_the_processes_and_the_calls(start: Start) -> None:
    group = start(Counter, 2)
    processes = [psutil.Process(pid(group, i)) for i in range(2)]
    pending = group.call(0, "sleep", 600)
    group.close()
    for future in (pending, group.call(1, "held")):
        with pytest.raises(ActorDied, match="closed"):
            future.result(LIMIT)
    assert all(map(is_gone, processes))
    assert group.restarts == 0


def test_ray_listens_on_loopback_only(start: Start) -> None:
    start(Counter, 1)
    family = {process.pid: process.name() for process in psutil.Process().children(recursive=True)}
    listening = {
        (family[c.pid], c.laddr.ip)
        for c in psutil.net_connections("inet")
        if c.pid in family and c.status == psutil.CONN_LISTEN
    }
    assert {name for name, _ in listening} >= {"raylet", "gcs_server"}
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}
