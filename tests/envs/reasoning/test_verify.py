import pytest

from envs.reasoning.problem import Problem
from envs.reasoning.sources import load_problems
from envs.reasoning.verify import CHECKS, register


def reason(verifier: str, answer: str, completion: str) -> str:
    verdict = CHECKS[verifier](Problem("p", "", answer, verifier), completion)
    assert verdict.correct == (verdict.reason == "correct")
    return verdict.reason


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", "correct"),
        (r"$\frac{1}{2}$", r"<think>x</think>\frac12", "correct"),
        ("1/2", "2/4", "correct"),
        ("2", "2*sqrt(3)", "wrong"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", "correct"),
        ("1234", "1,234", "correct"),
        ("5", "The answer is 5.", "correct"),
        ("5", "The answer is 6.", "wrong"),
        ("x = 3", "3", "correct"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", "correct"),
        ("(1, 2)", "(2, 1)", "wrong"),
        ("x^2 + 2x + 1", "(x+1)^2", "correct"),
        ("7", "<think>so 7", "unparsable"),
        ("7", "", "unparsable"),
    ],
)
def test_math(answer: str, completion: str, expected: str) -> None:
    assert reason("math", answer, completion) == expected


def test_math_refuses_an_answer_that_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="use `exact`"):
        reason("math", r"\text{}", "5")


def test_exact() -> None:
    assert reason("exact", "New  York", "<think>?</think> New York\n") == "correct"
    assert reason("exact", "New York", "new york") == "wrong"
    assert reason("exact", "New York", "<think>New York") == "unparsable"


def test_gym_is_the_score_of_the_dataset() -> None:
    (problem,) = load_problems("gym:spell_backward?min_word_len=10&max_word_len=10", 1, seed=0)
    assert CHECKS["gym"](problem, f"<think>a</think>{problem.answer.upper()}").reason == "correct"
    nearly = CHECKS["gym"](problem, problem.answer[:-1] + "?")
    assert nearly.reason == "partial"
    assert 0.1 < nearly.reward < 0.99
    assert CHECKS["gym"](problem, "<think>").reason == "unparsable"


def test_open_questions_are_scored_by_what_they_ask_for() -> None:
    (problem,) = load_problems("gym:graph_color?min_num_vertices=3&max_num_vertices=3&num_colors=3", 1, seed=0)
    assert problem.answer == ""
    assert CHECKS["gym"](problem, '{"0": 1, "1": 2, "2": 3}').correct
    assert not CHECKS["gym"](problem, '{"0": 1, "1": 1, "2": 1, "3": 1}').correct


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already"):
        register("math")(CHECKS["exact"])
