"""A supervised group of actors on Ray.

Each actor is a Host process. One thread per group, the supervisor, receives what Ray reports of the calls; when a
process has died or was ended for running past a time limit, it starts a replacement, repeats the sticky calls on it,
and only then lets the lost calls fail. Ray's own restarts are off: they would neither repeat state nor name a cause.
"""

import platform
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from launch.autopsy import BirthRecord, cause_of_death, last_lines
from launch.local_group import with_actor_index
from launch.ray_host import Host
from launch.run import ActorDied, CallTimedOut

START_LIMIT_S = 600.0  # for each of: finding a place, building the actor, repeating one sticky call
STARTS = 3  # deaths in a row before an actor is ready, after which the group gives it up
TICK_S = 0.1


class RayShared:
    """An object in Ray's object store."""

    def __init__(self, ref: "ray.ObjectRef[Any]") -> None:
        self.ref = ref

    def get(self) -> Any:
        return ray.get(self.ref)


@dataclass(eq=False)
class _Call:
    method: str
    names: list[str]  # of the last values, which are keyword arguments
    values: list[Any]
    timeout_s: float | None = None
    share_result: bool = False
    future: Future[Any] = field(default_factory=Future)
    started: float | None = None  # when it became the first in line: an actor works on one call at a time

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled


@dataclass(eq=False)
class _Life:
    """One process of an actor, from start to end."""

    handle: Any  # of the Host
    birth: BirthRecord
    pending: deque[_Call] = field(default_factory=deque)
    setup: list[_Call] = field(default_factory=list)  # what is left of building it and giving it its state
    process: psutil.Process | None = None  # if it runs on this machine; psutil notices when a pid is used anew
    cause: str = ""  # of its end


@dataclass(eq=False)
class _Actor:
    index: int
    label: str
    log: Path
    life: _Life | None = None
    stillbirths: int = 0  # lives in a row that ended before they were ready
    given_up: ActorDied | None = None
    ready: Future[None] = field(default_factory=Future)


_Report = tuple[_Actor, _Life, _Call, Any, BaseException | None]


class RayGroup:
    """The ActorGroup of launch/run.py. Blocks until every actor is built.

    variables: environment of the processes. announce: is told of deaths.
    Raises the exception of an actor's constructor, or ActorDied if its process ends three times in a row.
    """

    def __init__(
        self,
        cls: type,
        count: int,
        resources: Mapping[str, float],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        name: str,
        logs: Path,
        variables: Mapping[str, str],
        announce: Callable[[str], None],
    ) -> None:
        self.restarts = 0
        self.resources = resources
        self.closed = False
        self._cls, self._args, self._kwargs = cls, args, kwargs
        self._host: Any = ray.remote(Host).options(
            num_cpus=resources.get("cpu", 1),
            num_gpus=resources.get("gpu", 0),
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": dict(variables)},
        )
        self._announce = announce
        self._sticky: dict[str, _Call] = {}
        self._lock = threading.Lock()  # never taken in Ray's own threads: they only put into the queue
        self._reports: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._actors = [_Actor(i, f"{name}-{i}", logs.resolve() / f"{name}-{i}.log") for i in range(count)]
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervisor of {name}", daemon=True)
        self._supervisor.start()
        try:
            with self._lock:
                for actor in self._actors:
                    self._start(actor)
            self._await_ready(name)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._actors)

    def call(
        self,
        index: int,
        method: str,
        *args: Any,
        timeout_s: float | None = None,
        share_result: bool = False,
        **kwargs: Any,
    ) -> Future[Any]:
        call = _Call(method, list(kwargs), [*args, *kwargs.values()], timeout_s, share_result)
        with self._lock:
            self._submit(self._actors[index], call)
        return call.future

    def broadcast(
        self, method: str, *args: Any, timeout_s: float | None = None, sticky: bool = False, **kwargs: Any
    ) -> list[Future[Any]]:
        values = [*args, *kwargs.values()]
        if sticky:  # kept as they are now, whatever the trainer does to them later
            values = [value if isinstance(value, RayShared) else RayShared(ray.put(value)) for value in values]
        with self._lock:
            if sticky:
                self._sticky.pop(method, None)  # so that the order stays that of the latest calls
                self._sticky[method] = _Call(method, list(kwargs), values)
            calls = [_Call(method, list(kwargs), values, timeout_s) for _ in self._actors]
            for actor, call in zip(self._actors, calls, strict=True):
                self._submit(actor, call)
        return [call.future for call in calls]

    def close(self) -> None:
        """End the processes, and return when those on this machine are gone (and their GPU memory with them)."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            lives = [actor.life for actor in self._actors if actor.life]
            for life in lives:
                _end(life)
            for actor in self._actors:
                self._fail_pending(actor, ActorDied(f"{actor.label} was closed"))
        self._supervisor.join()
        psutil.wait_procs([life.process for life in lives if life.process], timeout=10)

    # Starting

    def _await_ready(self, name: str) -> None:
        for actor in self._actors:
            try:
                actor.ready.result(timeout=30)
            except TimeoutError:
                if actor.ready.done():
                    raise  # the constructor's own
                self._announce(f"waiting for {len(self)} x {name} {dict(self.resources)} to start")
                actor.ready.result()

    def _start(self, actor: _Actor) -> None:
        """Begin a life: a process, the object in it, and its state. Later calls wait in line behind these."""
        life = _Life(self._host.remote(actor.log), BirthRecord.now(actor.log))
        kwargs = with_actor_index(self._cls, self._kwargs, actor.index)
        whereabouts = _Call("", [], [], START_LIMIT_S)
        build = _Call("__init__", list(kwargs), [*self._args, *kwargs.values()], START_LIMIT_S)
        state = [_Call(call.method, call.names, call.values, START_LIMIT_S) for call in self._sticky.values()]
        life.setup = [whereabouts, build, *state]
        actor.life = life
        self._send(actor, life, whereabouts, life.handle.whereabouts.remote())
        self._send(actor, life, build, life.handle.build.remote(self._cls, build.names, *map(_unwrap, build.values)))
        for call in state:
            self._submit(actor, call)

    def _submit(self, actor: _Actor, call: _Call) -> None:
        life = actor.life
        if self.closed or actor.given_up or life is None:
            call.future.set_exception(actor.given_up or ActorDied(f"{actor.label} was closed"))
            return
        values = map(_unwrap, call.values)
        if call.share_result:
            done, result = life.handle.call_and_keep.options(num_returns=2).remote(call.method, call.names, *values)
            self._send(actor, life, call, done, RayShared(result))
        else:
            self._send(actor, life, call, life.handle.call.remote(call.method, call.names, *values))

    def _send(self, actor: _Actor, life: _Life, call: _Call, ref: Any, kept: RayShared | None = None) -> None:
        life.pending.append(call)
        if len(life.pending) == 1:
            call.started = time.monotonic()
        ref.future().add_done_callback(partial(self._report, actor, life, call, kept))

    def _report(self, actor: _Actor, life: _Life, call: _Call, kept: RayShared | None, outcome: Future[Any]) -> None:
        error = outcome.exception()
        value = None if error else kept or outcome.result()
        self._reports.put((actor, life, call, value, error))

    # Supervising

    def _supervise(self) -> None:
        try:
            while not self.closed:
                with suppress(queue.Empty):
                    report = self._reports.get(timeout=TICK_S)
                    with self._lock:
                        self._settle(*report)
                with self._lock:
                    self._end_overdue()
        except BaseException as bug:
            # Nobody would settle the calls any more: let them fail rather than hang.
            with self._lock:
                self.closed = True
                for actor in self._actors:
                    actor.given_up = ActorDied(f"the supervisor of {actor.label} failed: {bug!r}")
                    self._fail_pending(actor, actor.given_up)
            raise

    def _settle(self, actor: _Actor, life: _Life, call: _Call, value: Any, error: BaseException | None) -> None:
        if call not in life.pending:
            return  # it was given up together with its process
        if isinstance(error, RayActorError | WorkerCrashedError) and not isinstance(error, RayTaskError):
            self._bury(actor, life, cause_of_death(life.birth, str(error)))
            return
        life.pending.remove(call)
        if life.pending:
            life.pending[0].started = time.monotonic()
        if call in life.setup:
            self._settle_setup(actor, life, call, value, error)
        elif error is not None:
            call.future.set_exception(_own_type(error))
        else:
            call.future.set_result(value)

    def _settle_setup(self, actor: _Actor, life: _Life, call: _Call, value: Any, error: BaseException | None) -> None:
        if error is not None and not actor.ready.done():
            actor.ready.set_exception(_own_type(error))
        elif error is not None:
            self._bury(actor, life, f"its {call.method} raised {_own_type(error)!r} when it was repeated")
        else:
            if call.method == "" and value[0] == platform.node():
                with suppress(psutil.NoSuchProcess):
                    life.process = psutil.Process(value[1])
            life.setup.remove(call)
            if not life.setup:
                actor.stillbirths = 0
                if not actor.ready.done():
                    actor.ready.set_result(None)

    def _end_overdue(self) -> None:
        for actor in self._actors:
            life = actor.life
            if life is None or not life.pending or self.closed:
                continue
            call = life.pending[0]
            if call.timeout_s is None or call.started is None or time.monotonic() - call.started < call.timeout_s:
                continue
            cause = f"{call.method or 'its start'} ran past its limit of {call.timeout_s:g} s"
            # a start that took this long is not repeated
            self._bury(actor, life, cause, again=call not in life.setup, overdue=call)

    def _bury(self, actor: _Actor, life: _Life, cause: str, again: bool = True, overdue: _Call | None = None) -> None:
        """Make sure that a process is gone, start the next one, and let the lost calls fail."""
        _end(life)
        lost = life.pending[0].method if life.pending else ""
        error = ActorDied(f"{actor.label} died during {lost or 'its start'}: {cause}. {last_lines(life.birth)}")
        lost_calls, life.pending = life.pending, deque()
        actor.stillbirths += bool(life.setup)
        if actor.stillbirths >= STARTS or not again:
            actor.given_up = ActorDied(f"gave up {actor.label}, starts failed: {actor.stillbirths}. {error}")
            error = actor.given_up
            if not actor.ready.done():
                actor.ready.set_exception(error)
        else:
            self.restarts += 1
            self._start(actor)
        self._announce(f"{actor.label} died: {cause}. {'Given up' if actor.given_up else 'Replaced'}; see {actor.log}")
        for call in lost_calls:
            if not call.future.done():
                call.future.set_exception(CallTimedOut(str(error)) if call is overdue else error)

    def _fail_pending(self, actor: _Actor, error: ActorDied) -> None:
        if actor.life is None:
            return
        for call in actor.life.pending:
            if not call.future.done():
                call.future.set_exception(error)
        actor.life.pending.clear()
        if not actor.ready.done():
            actor.ready.set_exception(error)


def _end(life: _Life) -> None:
    ray.kill(life.handle, no_restart=True)
    if life.process is not None:
        with suppress(psutil.NoSuchProcess):
            life.process.kill()  # a stopped or wedged process does not hear Ray


def _unwrap(value: Any) -> Any:
    return value.ref if isinstance(value, RayShared) else value


def _own_type(error: BaseException) -> BaseException:
    """The exception as the actor raised it, with its traceback there as a note."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        cause = error.cause
        cause.add_note(f"In the actor:\n{error}")
        return cause
    return error
