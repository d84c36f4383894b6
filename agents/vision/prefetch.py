"""Results of actors, asked for ahead of their use and taken in order."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from models.errors import ActorsFailed

if TYPE_CHECKING:
    from launch.run import ActorGroup

AHEAD = 3  # calls in flight for each actor
ATTEMPTS = 5  # at one call, each on an actor that was started anew

Result = TypeVar("Result")


class KeptDying(ActorsFailed):
    """Actors that died one after another over the same call: the model and the run are well."""


def survive(future: "Future[Result]", again: "Callable[[], Future[Result]]", limit: str) -> Result:
    """The result of a call; if its actor died, of the call made again. limit: the flag that says how long it may take.

    Raises KeptDying after ATTEMPTS deaths over it.
    """
    attempt = 1
    while True:
        try:
            return future.result()
        except ConnectionError as error:
            if attempt == ATTEMPTS:
                raise KeptDying(
                    f"{ATTEMPTS} actors died one after another of the same call: {' '.join(str(error).split())[:300]}; "
                    f"mend what it works on, or allow it longer with {limit}"
                ) from error
            attempt, future = attempt + 1, again()


def in_order(
    actors: "ActorGroup", method: str, arguments: Iterable[tuple[Any, ...]], timeout_s: float
) -> Iterator[tuple[Any, float]]:
    """Yield `method(*arguments[i])` of each i in order, with the seconds that it was waited for.

    A call whose actor died is made again. Raises KeptDying after ATTEMPTS deaths over one call.
    """
    waiting: deque[tuple[int, tuple[Any, ...], Future[Any]]] = deque()
    remaining = enumerate(arguments)

    def ask(number: int, call: tuple[Any, ...]) -> Future[Any]:
        return actors.call(number % len(actors), method, *call, timeout_s=timeout_s)

    def ask_ahead() -> None:
        while len(waiting) < AHEAD * len(actors):
            following = next(remaining, None)
            if following is None:
                return
            waiting.append((*following, ask(*following)))

    ask_ahead()
    while waiting:
        number, call, future = waiting.popleft()
        begin = time.perf_counter()
        result = survive(future, partial(ask, number, call), "--loader-timeout-s")
        waited = time.perf_counter() - begin
        ask_ahead()
        yield result, waited
