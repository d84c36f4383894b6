from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from agents.vision.prefetch import ATTEMPTS, KeptDying, in_order


class Dying:
    """An actor group whose calls die a number of times before each answer."""

    restarts = 0

    def __init__(self, deaths: int) -> None:
        self.deaths, self.asked = deaths, [0] * 100

    def __len__(self) -> int:
        return 2

    def call(self, index: int, method: str, number: int, timeout_s: float | None = None) -> Future[int]:
        assert index == number % 2
        self.asked[number] += 1
        future: Future[int] = Future()
        if self.asked[number] <= self.deaths:
            future.set_exception(ConnectionError("died"))
        else:
            future.set_result(number * 10)
        return future


def test_results_come_in_order_and_deaths_are_survived() -> None:
    def results(deaths: int) -> Iterator[int]:
        return (r for r, _ in in_order(Dying(deaths), "f", ((n,) for n in range(9)), 1.0))  # type: ignore[arg-type]

    assert list(results(0)) == list(results(ATTEMPTS - 1)) == [n * 10 for n in range(9)]
    with pytest.raises(KeptDying, match=r"5 actors died .*: died; .* --loader-timeout-s"):
        list(results(ATTEMPTS))
