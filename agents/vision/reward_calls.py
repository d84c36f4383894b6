"""Rewards as they come from the actor that pays them."""

from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np

from envs.vision.custom_reward import RewardFailed


def paid(reward: str, timeout_s: float, asked: "Iterable[Future[np.ndarray]]") -> np.ndarray:
    """The rewards of all batches, joined along the first axis.

    Raises RewardFailed if the reward raised, took over `timeout_s`, ended its process or returned no numbers.
    """
    try:
        return np.concatenate([future.result() for future in asked])
    except ConnectionError as error:
        raise RewardFailed(
            f"reward {reward}: ended its process, or took over --reward-timeout-s {timeout_s:g} s "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
