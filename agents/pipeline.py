"""Calls of the workers: all at once, or under way while the learner learns. What a dead worker lost is asked again."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import UserError

if TYPE_CHECKING:
    from launch.run import ActorGroup

ATTEMPTS = 5  # at one call, each on a worker that was started anew


def call_each(workers: "ActorGroup", method: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float) -> list[Any]:
    """Call worker i with arguments[i], all at once; return the results in the workers' order.

    A call whose worker died is repeated on the worker that replaced it, and one that returned None, since it has more
    to do, on the same worker. Raises UserError after ATTEMPTS deaths.
    """
    waiting: deque[tuple[int, int, Future[Any]]] = deque(
        (i, 1, workers.call(i, method, *given, timeout_s=timeout_s)) for i, given in enumerate(arguments)
    )
    results: list[Any] = [None] * len(arguments)
    while waiting:
        i, attempt, future = waiting.popleft()
        try:
            results[i] = future.result()
        except ConnectionError as error:
            if attempt == ATTEMPTS:
                raise given_up(method, timeout_s, error) from error
            attempt += 1
        if results[i] is None:
            waiting.append((i, attempt, workers.call(i, method, *arguments[i], timeout_s=timeout_s)))
    return results


def given_up(method: str, timeout_s: float, error: ConnectionError) -> UserError:
    return UserError(
        f"{ATTEMPTS} workers died one after another of the same {method}(): {' '.join(str(error).split())[:300]}; mend "
        f"the environment, or allow a slow one more than --worker-timeout-s {timeout_s:g}"
    )


@dataclass(eq=False)
class _Call:
    number: int  # in the order in which they were issued
    worker: int
    arguments: Sequence[Any]
    future: Future[Any]
    attempt: int = 1


class Pipeline:
    """Calls of one method of a group of workers. A call whose worker died is issued again, to the worker's replacement.

    ahead: how many places in the order in which calls were issued a result may come before the oldest that is missing.
    With 0 results come in that order, so that a run depends on its seed alone, with any number of workers, as long as
    all of them live. Otherwise they come as they are ready, those of one worker in their order, and no worker waits for
    one that is a little slower; for
    one that is much slower all wait, so that its result is never staler than `ahead` others and the calls in line make
    it. With one worker any number is the same order.
    """

    def __init__(self, workers: "ActorGroup", method: str, timeout_s: float, ahead: int) -> None:
        self.workers, self.method, self.timeout_s, self.ahead = workers, method, timeout_s, ahead
        self.calls: list[_Call] = []  # oldest first
        self.issued = 0

    def __len__(self) -> int:
        return len(self.calls)

    def issue(self, worker: int, *arguments: Any) -> None:
        self.calls.append(_Call(self.issued, worker, arguments, self._send(worker, arguments)))
        self.issued += 1

    def next(self) -> tuple[int, Any]:
        """Wait for a call; return its worker and its result.

        Raises what the worker raised, and UserError when ATTEMPTS workers died of the same call.
        """
        while True:
            may_come = self._may_come()
            wait([call.future for call in may_come], return_when=FIRST_COMPLETED)
            call = next(call for call in may_come if call.future.done())
            try:
                result = call.future.result()
            except ConnectionError as error:
                if call.attempt == ATTEMPTS:
                    raise given_up(self.method, self.timeout_s, error) from error
                call.attempt += 1
                call.future = self._send(call.worker, call.arguments)
                continue
            self.calls.remove(call)
            return call.worker, result

    def _may_come(self) -> list[_Call]:
        """The oldest call of each worker, oldest first. Ray now and then reports a worker's next result before it."""
        oldest: dict[int, _Call] = {}
        for call in self.calls:
            oldest.setdefault(call.worker, call)
        return [call for call in oldest.values() if call.number <= self.calls[0].number + self.ahead]

    def _send(self, worker: int, arguments: Sequence[Any]) -> Future[Any]:
        return self.workers.call(worker, self.method, *arguments, timeout_s=self.timeout_s)
