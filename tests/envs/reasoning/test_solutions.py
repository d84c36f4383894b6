import re

import pytest
from reasoning_gym.factory import create_dataset

from envs.reasoning.answers import extract_answer
from envs.reasoning.problem import Problem
from envs.reasoning.solutions import worked_solution
from envs.reasoning.sources import load_problems

SPECS = [
    "chain_sum",
    "chain_sum?min_terms=2&max_terms=8&min_digits=1&max_digits=2&allow_negation=true",
    "products",
    "products?max_terms=4&allow_negation=true",
    "gcd",
    "gcd?min_numbers=2&max_numbers=5&max_value=100",
    "lcm",
    "lcm?max_numbers=4",
    "leg_counting",
    "leg_counting?min_animals=1&max_animals=2",
    "prime_factorization",
    "count_bits",
    "base_conversion",
    "base_conversion?min_base=2&max_base=36",
    "spell_backward",
    "letter_counting",
    "simple_equations",
    "simple_equations?max_terms=8&max_value=9",
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_worked_solution_is_scored_as_correct_by_the_dataset(spec: str) -> None:
    family = spec.partition("?")[0]
    scorer = create_dataset(family, seed=0, size=1)
    for problem in load_problems(f"gym:{spec}", 300, seed=0):
        if underdetermined(problem):
            assert problem.solution is None
            continue
        assert problem.solution is not None
        answer = extract_answer(problem.solution)
        assert answer == problem.answer
        assert scorer.score_answer(answer, {"answer": problem.answer, "metadata": {}, "question": ""}) == 1.0


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "spell" not in spec and "letter" not in spec])
def test_every_step_is_true_and_the_last_one_gives_the_answer(spec: str) -> None:
    for problem in load_problems(f"gym:{spec}", 100, seed=1):
        if underdetermined(problem):
            continue
        assert problem.solution is not None
        steps = problem.solution.removeprefix("<think>").partition("</think>")[0].splitlines()
        results = [check_step(step) for step in steps]
        if spec.startswith("chain_sum"):  # every line is worth as much as the question
            assert {value_of_sum(step) for step in steps} == {int(problem.answer)}
        if spec.startswith(("products", "lcm", "leg", "simple")) and results:
            assert results[-1] == int(problem.answer)
        if spec.startswith("count_bits"):
            assert steps[-1] == f"1 {problem.answer}"


def value_of_sum(line: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d+", line.replace("--", "+").replace("+-", "-")))


def underdetermined(problem: Problem) -> bool:
    """simple_equations at times cancels its variable: `... satisfies: 10 = 10`."""
    return problem.id.startswith("gym:simple_equations") and not re.search(r"[a-z]", problem.prompt.rpartition(":")[2])


def check_step(step: str) -> int | None:
    """Evaluate `12*3=36`, `dog 12*4=48` and `90/7=12r6`, and compare both sides."""
    left, equals, right = step.partition("=")
    if not equals:
        return None  # count_bits: a state, not an equation
    left = left.split()[-1]
    if "r" in right:
        quotient, remainder = right.split("r")
        a, b = left.split("/")
        assert (int(quotient), int(remainder)) == divmod(int(a), int(b)), step
        return None
    assert eval(left) == int(right), step
    return int(right)


@pytest.mark.parametrize(
    ("family", "entry", "solution"),
    [
        ("chain_sum", {"metadata": {"expression": "4 - 1 - 7"}, "answer": "-4"}, "<think>3-7\n-4</think>-4"),
        ("spell_backward", {"metadata": {"word": "sun"}, "answer": "nus"}, "<think>s u n\nn u s</think>nus"),
        ("gcd", {"metadata": {"numbers": [36, 48]}, "answer": "12"}, "<think>36%48=36\n48%36=12\n36%12=0</think>12"),
        (
            "products",
            {"metadata": {"expression": "7 * 305"}, "answer": "2135"},
            "<think>7*300=2100\n7*5=35\n2100+35=2135</think>2135",
        ),
        (
            "leg_counting",
            {"metadata": {"animals": {"dog": 2, "sea slug": 3, "wasp": 1}}, "answer": "14"},
            "<think>dog 2*4=8\nsea slug 3*0=0\n8+0=8\nwasp 1*6=6\n8+6=14</think>14",
        ),
        ("sudoku", {"metadata": {}, "answer": "1"}, None),
    ],
)
def test_format(family: str, entry: dict, solution: str | None) -> None:
    assert worked_solution(family, entry) == solution
