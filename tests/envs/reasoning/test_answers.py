import pytest

from envs.reasoning.answers import extract_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("42", "42"),
        ("  two words\n", "two words"),
        ("<think>1+1=2</think>2", "2"),
        ("1+1=2</think> 2", "2"),  # the prompt opened the thinking
        ("<think>a</think>1<think>b</think>2", "2"),
        ("<think>a</think>1<think>b", None),
        ("<think>\\boxed{7}", None),
        ("<think>\\boxed{7}</think>8", "8"),
        ("so \\boxed{1}, no, \\boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1} <answer>2</answer>", "1"),
        ("a <answer>1</answer> b <answer>2</answer> c", "2"),
        ("</answer> 3", "</answer> 3"),
        (r"\boxed{1", r"\boxed{1"),
        ("", None),
        (" \n", None),
        ("<think>a</think>", None),
        (r"\boxed{}", None),
    ],
)
def test_extract_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


@pytest.mark.timeout(60)  # quadratic time would be days
@pytest.mark.parametrize("piece", ["{", "}", "\\boxed{", "<think>", "</think>", "<answer>", "</answer>", "\\", "\0é"])
def test_ten_megabytes_take_linear_time(piece: str) -> None:
    garbage = piece * (10_000_000 // len(piece))
    extract_answer(garbage)
    extract_answer("\\boxed{" + garbage)
    assert extract_answer(garbage + "</think>5") == "5"
