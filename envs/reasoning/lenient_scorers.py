"""Scorers of reasoning-gym that pay for one and the same answer whatever the question is, and what they are held to.

A policy finds such an answer within a few iterations, and learns nothing else.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any


def _own_numbers(answer: str, entry: Mapping[str, Any]) -> bool:
    """Any four numbers that make 24 do: `6*4*1*1` is right everywhere."""
    return sorted(int(number) for number in re.findall(r"\d+", answer)) == sorted(entry["metadata"]["numbers"])


def _is_number(answer: str, entry: Mapping[str, Any]) -> bool:
    """The reward falls with the distance, and that of `nan` is no smaller than 1."""
    return "nan" not in answer.replace(" ", "").lower()


def _same_word(answer: str, entry: Mapping[str, Any]) -> bool:
    """The truth of the text is asked for, and `False` is a text."""
    return answer.strip().lower() == entry["answer"].lower()


# What must hold of an answer, and what the scorer itself pays for a wrong one.
DEMANDS: dict[str, tuple[Callable[[str, Mapping[str, Any]], bool], float]] = {
    "puzzle24": (_own_numbers, 0.01),
    "complex_arithmetic": (_is_number, 0.0),
    "game_of_life_halting": (_same_word, 0.0),
}


def corrected(reward: float, family: str, answer: str, entry: Mapping[str, Any]) -> float:
    """A scorer's reward, or that of a wrong answer if the answer does not meet the demand on its family."""
    demand, of_wrong = DEMANDS.get(family, (None, 0.0))
    return reward if demand is None or demand(answer, entry) else min(reward, of_wrong)
