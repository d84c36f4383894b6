"""The problems of a language run: to fine-tune on, to train on, and held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.reasoning.sources import load_problems

from envs.reasoning.problem import Problem
from llm_rl.config import LanguageJob
from models.errors import UserError
from models.seeding import derive_seed

HELD_OUT_SHARE = 0.2  # of a file, when no held-out problems are named


@dataclass(frozen=True)
class ProblemSets:
    sft: list[Problem]  # with worked solutions; empty when the phase is skipped
    train: list[Problem]
    heldout: list[Problem]


def load_problem_sets(config: LanguageJob, seed: int) -> ProblemSets:
    """Load all three. Held-out prompts are removed from the other two, so they are never trained on.

    Raises UserError if no problem is left, or if fine-tuning is asked for and nothing has a worked solution.
    """
    if not config.problems:
        raise UserError("--problems is empty: give a source such as gym:chain_sum?min_terms=2 or a .jsonl file")
    train = _load(config.problems, config.count, derive_seed(seed, "problems", "train"))
    if config.eval.problems:
        heldout = _load(config.eval.problems, config.eval.count, derive_seed(seed, "problems", "heldout"))
    else:
        heldout = _hold_out(config, train, seed)
    hidden = {problem.prompt for problem in heldout}
    train = [problem for problem in train if problem.prompt not in hidden]
    sft: list[Problem] = []
    if config.sft.steps:
        loaded = _load(config.sft.problems or config.problems, config.sft.count, derive_seed(seed, "problems", "sft"))
        sft = [problem for problem in loaded if problem.solution and problem.prompt not in hidden]
        if not sft:
            raise UserError("--sft.steps > 0, but no problem has a worked solution: add a `solution` field, or set 0")
    if not train:
        raise UserError("every training problem is also a held-out problem: raise --count or widen --problems")
    return ProblemSets(sft, train, heldout)


def _load(sources: Sequence[str], count: int, seed: int) -> list[Problem]:
    problems = [
        problem
        for number, source in enumerate(sources)
        for problem in load_problems(source, count if is_generated(source) else None, derive_seed(seed, number))
    ]
    unique: dict[str, Problem] = {}
    for problem in problems:
        unique.setdefault(problem.prompt, problem)
    return list(unique.values())


def _hold_out(config: LanguageJob, train: Sequence[Problem], seed: int) -> list[Problem]:
    """Fresh draws of generated sources; the last share of what the files hold."""
    generated = tuple(source for source in config.problems if is_generated(source))
    heldout = _load(generated, config.eval.count, derive_seed(seed, "problems", "heldout")) if generated else []
    names = {source for source in config.problems if not is_generated(source)}
    if names:
        filed = [problem for problem in train if not problem.id.startswith("gym:")]
        count = min(config.eval.count, max(1, int(len(filed) * HELD_OUT_SHARE)))
        heldout += filed[-count:]
    return heldout


def is_generated(source: str) -> bool:
    return source.startswith("gym:") and not Path(source).exists()
