"""Answers that reasoning-gym's own scorers would pay for whatever the question is."""

import pytest

from envs.reasoning import gym_dataset
from envs.reasoning.lenient_scorers import DEMANDS
from envs.reasoning.problem import Problem
from envs.reasoning.sources import load_problems


def problems(family: str) -> list[Problem]:
    return load_problems(f"gym:{family}", 20, seed=0)


@pytest.mark.parametrize("family", sorted(DEMANDS))
def test_right_answers_stay_right(family: str) -> None:
    for problem in problems(family):
        assert gym_dataset.score(problem.answer, problem.metadata) == 1.0


def test_a_24_of_other_numbers_is_wrong() -> None:
    for problem in problems("puzzle24"):
        ours = sorted(problem.metadata["entry"]["metadata"]["numbers"]) == [1, 1, 4, 6]
        assert gym_dataset.score("6*4*1*1", problem.metadata) == (1.0 if ours else 0.01)


@pytest.mark.parametrize("answer", ["nan", "NaN", "n an", "nani", "1+nani", "(nan+1i)"])
def test_what_is_no_number_is_wrong(answer: str) -> None:
    for problem in problems("complex_arithmetic"):
        assert gym_dataset.score(answer, problem.metadata) == 0


def test_a_partly_right_number_keeps_its_reward() -> None:
    scores = {gym_dataset.score("1 + 2i", problem.metadata) for problem in problems("complex_arithmetic")}
    assert len(scores) > 5


def test_true_and_false_are_different_words() -> None:
    for problem in problems("game_of_life_halting"):
        assert gym_dataset.score("False", problem.metadata) == (problem.answer == "False")
        assert gym_dataset.score(" true", problem.metadata) == (problem.answer == "True")
        assert gym_dataset.score("perhaps", problem.metadata) == 0
