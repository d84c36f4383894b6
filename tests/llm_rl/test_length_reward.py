import pytest

from llm_rl.length_reward import length_reward


def test_by_hand() -> None:
    # shortest correct gains 0.5, longest correct loses 0.5; a short wrong answer gains nothing, a long one loses
    assert length_reward([10, 30, 10, 30], [True, True, False, False]) == [0.5, -0.5, 0.0, -0.5]
    assert length_reward([10, 20, 30], [True, True, True]) == pytest.approx([0.5, 0.0, -0.5])


def test_equal_lengths_carry_no_reward() -> None:
    assert length_reward([7, 7, 7], [True, False, True]) == [0.0, 0.0, 0.0]
