"""What a detector's answers are worth, by a reward of the user's choice.

K answers an image, B images, Q queries, T objects of the truth.
"""

import math
from collections.abc import Callable, Collection

import numpy as np

from envs.vision.custom_reward import RewardFailed, failure, import_reward

# boxes xyxy (n, 4) and labels (n,) of an answer, then of the truth, relative to the image → the reward
Reward = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


class AnswerScorer:
    """An actor that pays for answers. Raises UserError if there is no reward of this name.

    no_thing: labels that are neither paid nor punished, those of stuff and "no object".
    """

    def __init__(self, name: str, no_thing: Collection[int]) -> None:
        self._name, self._no_thing = name, list(no_thing)
        self._reward: Reward = import_reward(name)

    def score(
        self,
        labels_KBQ: np.ndarray,
        boxes_BQ4: np.ndarray,
        true_labels_BT: np.ndarray,
        true_boxes_BT4: np.ndarray,
        valid_BT: np.ndarray,
    ) -> np.ndarray:
        """Rewards (K, B) float32; boxes are xyxy. Raises RewardFailed if the reward raises or is not finite."""
        wanted_BT = valid_BT & ~np.isin(true_labels_BT, self._no_thing)
        given_KBQ = ~np.isin(labels_KBQ, self._no_thing)
        rewards_KB = np.zeros(labels_KBQ.shape[:2], np.float32)
        for k, i in np.ndindex(rewards_KB.shape):
            truth = true_boxes_BT4[i, wanted_BT[i]], true_labels_BT[i, wanted_BT[i]]
            given = given_KBQ[k, i]
            rewards_KB[k, i] = self._reward_of(boxes_BQ4[i, given], labels_KBQ[k, i, given], *truth)
        return rewards_KB

    def _reward_of(self, *answer_and_truth: np.ndarray) -> float:
        try:
            reward = float(self._reward(*answer_and_truth))
        except Exception as error:  # a user's function may raise anything
            raise failure(self._name, error) from error
        if not math.isfinite(reward):
            raise RewardFailed(f"reward {self._name}: returned {reward}; it must be a finite number")
        return reward
