"""How fast a run goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.run import ActorGroup


class Clock:
    """Speeds since the last `restart`, which comes after each line of metrics: what is between a look at the speeds
    and the restart (logging, evaluating, saving) does not count.

    counters: the learner's attributes that count what is timed.

    `time/waited_for_workers` is the share of the time that was spent within `waiting`: near 1 the environments are what
    a run takes, and more workers make it faster; near 0 it is the learner. Workers without Ray play while they are
    called, so that calling them counts too.
    """

    def __init__(self, learner: object, workers: "ActorGroup", *counters: str) -> None:
        self.learner, self.workers, self.counters = learner, workers, counters
        self.restart()

    def restart(self) -> None:
        self.began, self.before, self.waited = time.perf_counter(), self._counts(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        now = self._counts()
        rates = {f"time/{name}_per_s": (now[name] - self.before[name]) / seconds for name in self.counters}
        rates["time/waited_for_workers"] = self.waited / seconds
        return rates | {"run/actor_restarts": float(self.workers.restarts)}

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.learner, name) for name in self.counters}
