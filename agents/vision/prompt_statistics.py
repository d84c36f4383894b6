"""Rewards to advantages: each prompt has a mean and a deviation of its own (Black et al. 2023, section 4.3).

Prompts differ in how well they pay. Normalised over all of them, the easy ones would look good whatever is drawn.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

_SMALL = 1e-6  # added to deviations


class PromptStatistics:
    """Remembers the last `buffer_size` rewards of each prompt. With fewer than `min_count` of them, the prompt's
    advantages are normalised by the whole batch."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self._buffer_size, self._min_count = buffer_size, min_count
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """Take in a batch of rewards (N,), and return their advantages (N,)."""
        names = np.array(prompts, dtype=object)
        advantages = np.empty(len(rewards))
        for prompt in dict.fromkeys(prompts):
            its = rewards[names == prompt]
            remembered = self._rewards.setdefault(prompt, deque(maxlen=self._buffer_size))
            remembered.extend(its.tolist())
            known = np.array(remembered) if len(remembered) >= self._min_count else rewards
            advantages[names == prompt] = (its - known.mean()) / (known.std() + _SMALL)
        return advantages

    def state(self) -> dict[str, Any]:
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._rewards = {prompt: deque(rewards, maxlen=self._buffer_size) for prompt, rewards in state.items()}
