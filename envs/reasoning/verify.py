"""The checks: what a completion is worth. They run in the worker processes of `envs.reasoning.verifier_pool`, or in
forks of these.

A check may hang, crash or eat memory on a hostile completion; the pool is what contains it.
"""

import functools
import re
from collections.abc import Callable, Iterable

from envs.reasoning import gym_dataset
from envs.reasoning.answers import extract_answer
from envs.reasoning.evaluated_answers import EVALUATED
from envs.reasoning.problem import Problem, Verdict

Check = Callable[[Problem, str], Verdict]  # (problem, completion) → verdict

CHECKS: dict[str, Check] = {}


def register(name: str) -> Callable[[Check], Check]:
    """Register a check under the name that `Problem.verifier` calls it by."""

    def add(check: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"verifier `{name}` is registered already")
        CHECKS[name] = check
        return check

    return add


def needs_fork(problem: Problem) -> bool:
    """Whether a check hands the answer to something that may run it. Comparing text leaves nothing behind, and a fork
    takes a hundred times as long."""
    if problem.verifier == "gym":
        return problem.metadata["family"] in EVALUATED
    return problem.verifier != "exact"


def warm_up(problems: Iterable[Problem]) -> None:
    """Do once what is slow the first time: import, build grammars and datasets. No completion is looked at."""
    for problem in problems:
        if problem.verifier == "math":
            _warm_up_math()
        elif problem.verifier == "gym":
            gym_dataset.warm_up(problem.answer, problem.metadata)


def verdict_of(reward: float) -> Verdict:
    """Name the reason of a reward."""
    graded = Verdict(reward, "partial" if reward > 0.0 else "wrong")
    return Verdict(reward, "correct") if graded.correct else graded


UNPARSABLE = Verdict(0.0, "unparsable")


@register("exact")
def exact(problem: Problem, completion: str) -> Verdict:
    """The answer is the same text, up to white space."""
    answer = extract_answer(completion)
    if answer is None:
        return UNPARSABLE
    return verdict_of(float(answer.split() == problem.answer.split()))


@register("gym")
def gym(problem: Problem, completion: str) -> Verdict:
    """The reasoning-gym dataset's own score, which may be partial. Some scorers raise on what they cannot read."""
    answer = extract_answer(completion)
    if answer is None:
        return UNPARSABLE
    try:
        return verdict_of(gym_dataset.score(answer, problem.metadata))
    except (ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, AttributeError):
        return UNPARSABLE


# math-verify ends its own work by SIGALRM, softly, before the pool kills the process. It counts whole seconds.
_MATH_TIMEOUT_S = 2
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[ ,:]+[A-Za-z]{2,}")


@register("math")
def math_equal(problem: Problem, completion: str) -> Verdict:
    """The answer is mathematically equal to the problem's (math-verify on LaTeX, numbers and plain expressions)."""
    answer = extract_answer(completion)
    if answer is None:
        return UNPARSABLE
    if answer.split() == problem.answer.split():
        return verdict_of(1.0)
    import math_verify

    parsed = math_verify.parse(_as_latex(answer), parsing_timeout=_MATH_TIMEOUT_S)
    if not parsed:
        return UNPARSABLE
    gold = math_verify.parse(_as_latex(problem.answer), parsing_timeout=_MATH_TIMEOUT_S)
    if not gold:
        raise ValueError(f"math-verify cannot read the answer `{problem.answer}` of {problem.id}: use `exact`")
    return verdict_of(float(math_verify.verify(gold, parsed, timeout_seconds=_MATH_TIMEOUT_S)))


@functools.cache
def _warm_up_math() -> None:
    import math_verify

    value = math_verify.parse(r"\boxed{\frac{1}{2}}", parsing_timeout=_MATH_TIMEOUT_S)
    math_verify.verify(value, value, timeout_seconds=_MATH_TIMEOUT_S)


def _as_latex(answer: str) -> str:
    """A bare expression is boxed, so that all of it is read; from a sentence math-verify extracts the expression."""
    return answer if _PROSE.search(answer) else f"\\boxed{{{answer.strip('$')}}}"
