"""Actor and critic as two tanh MLPs."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class ActorCritic(nn.Module):
    """A policy over discrete actions and a state value, on networks that share nothing.

    Initialisation is orthogonal with gain √2; the last layer of the actor has gain 0.01, so that the first policy is
    nearly uniform, and that of the critic has gain 1 (Andrychowicz et al., "What matters in on-policy RL", 2020).
    """

    def __init__(self, observation_size: int, actions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.actor = _mlp([observation_size, *hidden, actions], last_gain=0.01)
        self.critic = _mlp([observation_size, *hidden, 1], last_gain=1.0)

    def log_probs(self, observations: Tensor) -> Tensor:
        """(..., D) → log-probabilities of the actions (..., A)."""
        return self.actor(observations).log_softmax(-1)

    def values(self, observations: Tensor) -> Tensor:
        """(..., D) → values (...)."""
        return self.critic(observations).squeeze(-1)


def _mlp(sizes: Sequence[int], last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)
