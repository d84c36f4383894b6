"""Which scorers of reasoning-gym evaluate an answer, and which answers they are shown."""

import inspect
import re
import sys

import pytest
from reasoning_gym.factory import DATASETS

from envs.reasoning import gym_dataset
from envs.reasoning.evaluated_answers import ARITHMETIC, EVALUATED, EXPRESSIONS, LISTS, is_plain
from envs.reasoning.sources import load_problems

EVALUATORS = re.compile(r"\b(eval|exec|parse_expr|sympify|S|lambdify)\(")
OF_THEIR_OWN_TEXT = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}


def test_every_scorer_that_evaluates_an_answer_is_known() -> None:
    found = {
        family
        for family, (dataset, _) in DATASETS.items()
        if EVALUATORS.search(inspect.getsource(sys.modules[dataset.__module__]))
    }
    assert {family for family in found if not family.startswith("gsm")} - OF_THEIR_OWN_TEXT == EVALUATED


@pytest.mark.parametrize("family", sorted(EVALUATED))
def test_right_answers_pass(family: str) -> None:
    for problem in load_problems(f"gym:{family}", 40, seed=1):
        if "Integral" in problem.answer:
            continue
        assert is_plain(family, problem.answer, problem.answer), problem.answer
        assert gym_dataset.score(problem.answer, problem.metadata) == 1.0


@pytest.mark.parametrize("answer", ["3*x**2/4 + C", "sin(x)**2 - 1.5*exp(-x/2) + .5", "-x*log(2, 10) + x1", "1e-3*x"])
def test_formulas_pass(answer: str) -> None:
    assert is_plain("simple_integration", answer, "x") == ("x1" not in answer)
    assert is_plain("simple_integration", answer, "x1")


def test_the_question_is_no_answer() -> None:
    unsolved = [p for p in load_problems("gym:intermediate_integration", 60, seed=0) if "Integral" in p.answer]
    asked = unsolved[0].metadata["entry"]["metadata"]
    assert gym_dataset.score(f"Integral({asked['integrand']}, {asked['variable']})", unsolved[0].metadata) == 0
    assert gym_dataset.score(unsolved[0].answer, unsolved[0].metadata) == 0
    (simple,) = (p for p in unsolved if p.answer == "2*Integral(x**2*sin(x), x) + C")
    assert gym_dataset.score("-2*x**2*cos(x) + 4*x*sin(x) + 4*cos(x)", simple.metadata) == 1


def test_an_answer_that_no_scorer_is_shown_does_not_count_as_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = load_problems("gym:intermediate_integration", 60, seed=0)
    monkeypatch.setattr(gym_dataset, "_warm", set())
    gym_dataset._scorer.cache_clear()
    for unsolved in (True, False):
        problem = next(p for p in problems if ("Integral" in p.answer) == unsolved)
        gym_dataset.warm_up(problem.answer, problem.metadata)
    assert gym_dataset._scorer.cache_info().currsize == 1


HOSTILE = [
    "exec('x')", "eval(x)", "__import__('os')", "open(x)", "getattr(x, y)", "x.diff", "x .diff", "1 .real", "1..real",
    "sin('x')", 'sin("x")', "x[0]", "{x}", "lambda: 0", "(lambda x: x)(1)", "x := 1", "x if y else z", "1if x else y",
    "ｅval(x)", "sympify(x)", "x; y", "x@y", "f'{x}'", "x=1", "#", "\\", "preview(x)", "x__class__", "__", "1_0.real",
]  # fmt: skip


@pytest.mark.parametrize("family", sorted(ARITHMETIC | EXPRESSIONS))
@pytest.mark.parametrize("answer", HOSTILE)
def test_code_does_not_pass(answer: str, family: str) -> None:
    assert not is_plain(family, answer, "x")


def test_sums_have_no_names() -> None:
    assert is_plain("countdown", "(1 + 2)*3.5 / 4 - 5**2", "x")
    assert not is_plain("countdown", "x", "x")


@pytest.mark.parametrize("family", sorted(ARITHMETIC | EXPRESSIONS))
def test_the_time_is_linear(family: str) -> None:
    for answer in ("1" * 200_000 + "!", "1." * 100_000 + "!", "x" * 200_000 + "!", "1e" * 100_000):
        assert not is_plain(family, answer, "x")


@pytest.mark.parametrize("family", sorted(LISTS))
def test_lists_are_read_as_literals(family: str) -> None:
    problem = load_problems(f"gym:{family}", 1, seed=0)[0]
    rows = [line.split() for line in problem.answer.splitlines()]
    numbers = [[int(n) for n in row] for row in rows] if family in ("binary_matrix", "spiral_matrix") else rows
    listed = {
        "binary_matrix": str(numbers), "spiral_matrix": str(numbers[0]), "n_queens": str(rows),
        "string_insertion": str(list(problem.answer)),
    }[family]  # fmt: skip
    assert 0 < gym_dataset.score(listed, problem.metadata) < 1
    assert gym_dataset.score(f"list({listed})", problem.metadata) == 0
    assert gym_dataset.score("oracle_answer", problem.metadata) == 0
