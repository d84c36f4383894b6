"""The problems of a language run: to fine-tune on, to train on, and held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.reasoning.problem import Problem
from envs.reasoning.sources import is_generated, load_problems
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
    """Load all three. The held-out problems come first, and the other two leave out their prompts.

    Raises UserError if a file is named twice for one of them, and if fine-tuning is asked for and nothing has a worked
    solution.
    """
    if not config.problems:
        raise UserError("--problems is empty: give a source such as gym:chain_sum?min_terms=2 or a .jsonl file")
    _require_different_files("--problems", config.problems)
    _require_different_files("--eval.problems", config.eval.problems)
    _require_different_files("--sft.problems", config.sft.problems)
    if config.eval.problems:
        heldout = _load(config.eval.problems, config.eval.count, derive_seed(seed, "problems", "heldout"), [])
    else:
        heldout = _hold_out(config, seed)
    train = _load(config.problems, config.count, derive_seed(seed, "problems", "train"), heldout)
    sft: list[Problem] = []
    if config.sft.steps:
        sources = config.sft.problems or config.problems
        loaded = _load(sources, config.sft.count, derive_seed(seed, "problems", "sft"), heldout)
        sft = [problem for problem in loaded if problem.solution]
        if not sft:
            raise UserError("--sft.steps > 0, but no problem has a worked solution: add a `solution` field, or set 0")
    return ProblemSets(sft, train, heldout)


def _require_different_files(flag: str, sources: Sequence[str]) -> None:
    files = [Path(source).resolve() for source in sources if not is_generated(source)]
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"{flag} names the file {file} twice: keep one")


def _load(sources: Sequence[str], count: int, seed: int, exclude: Sequence[Problem]) -> list[Problem]:
    """`count` problems of each generated source, and the whole of each file; no prompt twice."""
    problems: list[Problem] = []
    for number, source in enumerate(sources):
        wanted = count if is_generated(source) else None
        problems += load_problems(source, wanted, derive_seed(seed, number), [*exclude, *problems])
    return problems


def _hold_out(config: LanguageJob, seed: int) -> list[Problem]:
    """Fresh draws of generated sources; a share of each file, at most `eval.count`."""
    seed = derive_seed(seed, "problems", "heldout")
    heldout = _load([s for s in config.problems if is_generated(s)], config.eval.count, seed, [])
    for source in config.problems:
        if not is_generated(source):
            count = len(load_problems(source, None, seed, heldout))
            if count < 2:
                raise UserError(f"`{source}` holds one problem, and one must be held out: add problems")
            heldout += load_problems(source, min(config.eval.count, max(1, int(count * HELD_OUT_SHARE))), seed, heldout)
    return heldout
