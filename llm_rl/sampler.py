"""Which problems to train on next: curriculum and prioritised sampling (Kimi k1.5, section 2.3.4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.reasoning.problem import Problem
from envs.reasoning.sources import is_generated
from models.errors import UserError
from models.seeding import derive_seed

MEMORY = 0.5  # share of the newest visit in a problem's success rate
LEVEL_MEMORY = 0.2  # the same for a difficulty level, which is seen far more often
FLOOR = 0.05  # a solved problem is still visited at this weight
LEVELS = 5  # difficulty levels of a family at most


class ProblemSampler:
    """Draws problems with probability proportional to 1 - s_i, s_i being the tracked success rate.

    The curriculum admits, family by family, the next difficulty once the success rate at the hardest admitted one
    reaches `admit_at`. P problems. The state is the success rates, visits and levels: plain arrays and numbers.
    """

    def __init__(
        self, problems: Sequence[Problem], seed: int, prioritised: bool, curriculum: bool, admit_at: float
    ) -> None:
        self.problems, self.seed, self.prioritised, self.admit_at = list(problems), seed, prioritised, admit_at
        names, self.family_P = np.unique([family(p) for p in problems], return_inverse=True)
        self.families: list[str] = names.tolist()
        self.level_P = np.zeros(len(problems), dtype=np.int64)
        self.top: dict[str, int] = {}
        for number, name in enumerate(self.families):
            members = np.flatnonzero(self.family_P == number)
            self.level_P[members] = levels([problems[i].difficulty or 0.0 for i in members])
            self.top[name] = int(self.level_P[members].max())
        self.admitted = {f: 0 if curriculum else self.top[f] for f in self.families}
        self.level_success = dict.fromkeys(self.families, 0.0)  # at the hardest admitted level
        self.success_P = np.full(len(problems), 0.5)
        self.visits_P = np.zeros(len(problems), dtype=np.int64)

    def sample(self, count: int, iteration: int) -> list[int]:
        """Return indices of `count` different problems (all admitted ones if there are fewer)."""
        limit_P = np.array([self.admitted[f] for f in self.families])[self.family_P]
        weight_P = np.where(self.level_P <= limit_P, 1.0, 0.0)
        if self.prioritised:
            weight_P *= np.maximum(1.0 - self.success_P, FLOOR)
        rng = np.random.default_rng(derive_seed(self.seed, "sampler", iteration))
        count = min(count, int((weight_P > 0).sum()))
        return rng.choice(len(weight_P), size=count, replace=False, p=weight_P / weight_P.sum()).tolist()

    def update(self, indices: Sequence[int], success: Sequence[float]) -> None:
        """Record the mean correctness of each visited problem's samples."""
        for index, rate in zip(indices, success):
            self.visits_P[index] += 1
            self.success_P[index] += MEMORY * (rate - self.success_P[index])
        for number, name in enumerate(self.families):
            at_top = [
                rate
                for i, rate in zip(indices, success)
                if self.family_P[i] == number and self.level_P[i] == self.admitted[name]
            ]
            if not at_top:
                continue
            self.level_success[name] += LEVEL_MEMORY * (float(np.mean(at_top)) - self.level_success[name])
            if self.level_success[name] >= self.admit_at and self.admitted[name] < self.top[name]:
                self.admitted[name] += 1
                self.level_success[name] = 0.0

    def metrics(self) -> dict[str, float]:
        return {f"sampler/level/{name}": float(self.admitted[name]) for name in self.families} | {
            "sampler/visited": float((self.visits_P > 0).mean())
        }

    def state(self) -> dict[str, Any]:
        return {
            "success": self.success_P.copy(),
            "visits": self.visits_P.copy(),
            "admitted": dict(self.admitted),
            "level_success": dict(self.level_success),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises UserError for the state of a sampler of other problems."""
        then, now = (len(state["success"]), sorted(state["admitted"])), (len(self.problems), self.families)
        if then != now:
            raise UserError(
                f"the checkpoint knows {then[0]} problems of {', '.join(then[1])}, and there are {now[0]} of "
                f"{', '.join(now[1])}: bring back the problems that the run began with, or train anew"
            )
        self.success_P = np.array(state["success"])
        self.visits_P = np.array(state["visits"])
        self.admitted = dict(state["admitted"])
        self.level_success = dict(state["level_success"])


def levels(difficulties: Sequence[float]) -> np.ndarray:
    """Number the difficulties from 0, equal ones alike; more than LEVELS different ones are cut at quantiles."""
    values, rank_P = np.unique(difficulties, return_inverse=True)
    if len(values) <= LEVELS:
        return rank_P
    cuts = np.quantile(difficulties, np.arange(1, LEVELS) / LEVELS)
    return np.unique(np.searchsorted(cuts, difficulties, side="left"), return_inverse=True)[1]


def family(problem: Problem) -> str:
    """`gym:chain_sum` of a problem of `gym:chain_sum?min_terms=2`; the file of a file's problem."""
    return problem.source.partition("?")[0] if is_generated(problem.source) else problem.source
