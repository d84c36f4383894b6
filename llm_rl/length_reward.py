"""The length reward of Kimi k1.5, section 2.3.3."""

from collections.abc import Sequence


def length_reward(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """λ = 0.5 - (len - min)/(max - min) within the samples of one problem; λ if correct, else min(0, λ).

    Shorter correct answers gain up to 0.5, longer ones lose up to 0.5, and a wrong answer never gains by being short.
    All zero when the samples are equally long.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    bonus = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [value if right else min(0.0, value) for value, right in zip(bonus, correct)]
