"""Actors in the trainer's own process, for unit tests and debuggers (`--backend local`)."""

import inspect
import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from launch.actor_environment import actor_environment
from launch.run import Shared


class LocalShared:
    """The object itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class LocalGroup:
    """Calls run at once in the calling thread, so a breakpoint or a traceback is where one looks for it.

    A time limit cannot be kept here, since nobody is left to keep it: `timeout_s` is ignored.
    """

    restarts = 0

    def __init__(self, cls: type, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._actors = [cls(*args, **with_actor_index(cls, kwargs, index)) for index in range(count)]

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
        future: Future[Any] = Future()
        try:
            result = getattr(self._actors[index], method)(
                *map(_unwrap, args), **{name: _unwrap(value) for name, value in kwargs.items()}
            )
        except Exception as error:  # noqa: BLE001  (whatever it is, it belongs to the Future)
            future.set_exception(error)
        else:
            future.set_result(LocalShared(result) if share_result else result)
        return future

    def broadcast(
        self, method: str, *args: Any, timeout_s: float | None = None, sticky: bool = False, **kwargs: Any
    ) -> list[Future[Any]]:
        return [self.call(index, method, *args, **kwargs) for index in range(len(self))]

    def close(self) -> None:
        for actor in self._actors:
            if hasattr(actor, "close"):  # a process of its own would end here; an engine in ours has to let go
                actor.close()
        self._actors = []


def with_actor_index(cls: type, kwargs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Add the actor's number to the keyword arguments if the constructor asks for it."""
    if "actor_index" in inspect.signature(cls).parameters:
        return {**kwargs, "actor_index": index}
    return dict(kwargs)


def _unwrap(argument: Any) -> Any:
    shared: Shared | Any = argument
    return shared.get() if isinstance(shared, LocalShared) else argument


class LocalBackend:
    """Carries actors without Ray. The environment variables of actors become the process's own."""

    def __init__(self, device: str) -> None:
        os.environ.update(actor_environment(device))
        self._groups: list[LocalGroup] = []

    def actors(
        self,
        cls: type,
        count: int,
        resources: Mapping[str, float],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        name: str,
    ) -> LocalGroup:
        self._groups.append(LocalGroup(cls, count, args, kwargs))
        return self._groups[-1]

    def share(self, value: Any) -> LocalShared:
        return LocalShared(value)

    def close(self) -> None:
        for group in self._groups:
            group.close()
