"""A problem, and the verdict on one completion of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer.

    id: stable over runs; names the source and the problem in it, e.g. `gym:chain_sum?min_terms=2@0#17`, so that
        problems of different sources have different ids.
    verifier: name of the check, `gym` (the dataset's own scorer), `math` (math-verify), `exact`, or `scene`
        (models that draw and look, in actors of their own).
    solution: a worked solution ending in the answer, the target of supervised fine-tuning; None where there is none.
    difficulty: any number that grows with difficulty (size of the instance, a label); None if unknown.
    metadata: plain JSON data that the verifier needs (the reasoning-gym entry).
    source: what it was loaded from, a file as the user named it or a generator with its parameters; empty for a problem
        that was not loaded.
    """

    id: str
    prompt: str
    answer: str
    verifier: str
    solution: str | None = None
    difficulty: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Verdict:
    """reward in [0, 1], and why: `correct`, `partial`, `wrong`, `unparsable`, `timeout`, `crash`, `too_long`, or `lost`
    where no verifier was left to ask."""

    reward: float
    reason: str

    @property
    def correct(self) -> bool:
        return self.reward >= 0.99
