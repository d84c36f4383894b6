"""Rewards that tests name by `tests.agents.vision.rewards:...`."""

import time
from collections.abc import Sequence

import numpy as np


def brightness(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    return [float(image.mean()) / 255 for image in images]


def raises(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    raise ZeroDivisionError("no scale\nto weigh with")


_calls = 0


def fails_later(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    """Like brightness, for the first six batches."""
    global _calls
    _calls += 1
    if _calls > 6:
        raise ZeroDivisionError("too late")
    return brightness(images, prompts)


def hangs(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    time.sleep(600)
    return []


def not_a_number(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    return [float("nan")] * len(images)


def too_few(images: np.ndarray, prompts: Sequence[str]) -> list[float]:
    return [1.0]


NOT_A_FUNCTION = 3
