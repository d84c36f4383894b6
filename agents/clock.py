"""How fast a run goes."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.run import ActorGroup


class Clock:
    """Speeds since the last `restart`, which comes after each line of metrics: what is between a look at the speeds
    and the restart (logging, evaluating, saving) does not count.

    counters: the learner's attributes that count what is timed.
    """

    def __init__(self, learner: object, workers: "ActorGroup", *counters: str) -> None:
        self.learner, self.workers, self.counters = learner, workers, counters
        self.restart()

    def restart(self) -> None:
        self.began, self.before = time.perf_counter(), self._counts()

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        now = self._counts()
        rates = {f"time/{name}_per_s": (now[name] - self.before[name]) / seconds for name in self.counters}
        return rates | {"run/actor_restarts": float(self.workers.restarts)}

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.learner, name) for name in self.counters}
