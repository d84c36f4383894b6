"""Results of actors, asked for ahead of their use and taken in order."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.run import ActorGroup

AHEAD = 3  # calls in flight for each actor
ATTEMPTS = 5  # at one call, each on an actor that was started anew


def in_order(
    actors: "ActorGroup", method: str, arguments: Iterable[tuple[Any, ...]], timeout_s: float
) -> Iterator[tuple[Any, float]]:
    """Yield `method(*arguments[i])` of each i in order, with the seconds that it was waited for.

    A call whose actor died is made again. Raises ConnectionError after ATTEMPTS deaths over one call.
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
        for attempt in range(1, ATTEMPTS + 1):
            try:
                result = future.result()
                break
            except ConnectionError:
                if attempt == ATTEMPTS:
                    raise
                future = ask(number, call)
        waited = time.perf_counter() - begin
        ask_ahead()
        yield result, waited
