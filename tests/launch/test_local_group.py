import threading

import pytest

from launch.config import RunConfig
from launch.local_group import LocalBackend
from tests.launch.actors import Counter, Picky


def group(count: int = 2, *args: object) -> object:
    return LocalBackend("cpu").actors(Counter, count, {"cpu": 1}, args, {}, "counter")


def test_calls_run_at_once_in_order_and_in_the_calling_thread() -> None:
    actors = group()
    futures = [actors.call(0, "note", i) for i in range(3)]
    assert all(future.done() for future in futures)
    assert futures[-1].result() == [0, 1, 2]
    assert actors.call(1, "note", "other").result() == ["other"]
    assert actors.call(0, "note", threading.get_ident()).result()[-1] == threading.get_ident()


def test_actors_get_their_arguments_and_number() -> None:
    actors = group(3, 7)
    assert len(actors) == 3
    assert [(actor.base, actor.index) for actor in actors._actors] == [(7, 0), (7, 1), (7, 2)]


def test_errors_keep_their_type() -> None:
    future = group().call(0, "refuse")
    with pytest.raises(LookupError, match="no such thing"):
        future.result()
    with pytest.raises(LookupError, match="not with these"):
        LocalBackend("cpu").actors(Picky, 1, {}, (), {}, "picky")


def test_shared_objects_are_the_objects_themselves() -> None:
    backend = LocalBackend(RunConfig().device)
    actors = backend.actors(Counter, 2, {"cpu": 1}, (), {}, "counter")
    kept = actors.call(0, "array", 5, share_result=True).result()
    assert actors.call(1, "total", kept).result() == (10.0, True)
    value = object()
    assert backend.share(value).get() is value
    assert actors.call(0, "note", what=backend.share(value)).result() == [value]
