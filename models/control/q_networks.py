"""Networks for continuous actions learnt from a Q function: deterministic actor, squashed Gaussian, Q critics.

Actions are in [-1, 1] throughout; whoever plays scales them to the environment's bounds.

Shapes: B transitions, D numbers an observation, A an action, X = D + A.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from models.control.networks import plain_mlp
from models.control.numpy_policies import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    Activation,
    NumpyDeterministic,
    NumpySquashedGaussian,
)


class DeterministicActor(nn.Module):
    """μ(s) = tanh(MLP(s)) (Lillicrap et al., arXiv 1509.02971, §7). noise_std: of what a worker adds to explore."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        activation: Activation,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (observation_size, *hidden, action_size)
        self.layers = plain_mlp(sizes, activation)
        self.numpy_policy: Callable[[np.ndarray], NumpyDeterministic] = partial(
            NumpyDeterministic, sizes, activation, noise_std
        )

    def forward(self, observations_BD: Tensor) -> Tensor:
        return torch.tanh(self.layers(observations_BD))

    def flat_weights(self) -> np.ndarray:
        return parameters_to_vector(self.parameters()).detach().cpu().numpy()


class SquashedGaussian(nn.Module):
    """a = tanh(u), u ~ N(μ(s), σ(s)²) with one network for both (Haarnoja et al., arXiv 1801.01290, appendix C)."""

    def __init__(self, observation_size: int, action_size: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        sizes = (observation_size, *hidden, 2 * action_size)
        self.layers = plain_mlp(sizes, activation)
        self.numpy_policy: Callable[[np.ndarray], NumpySquashedGaussian] = partial(
            NumpySquashedGaussian, sizes, activation
        )

    def forward(self, observations_BD: Tensor, noise_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A) that the standard normal `noise_BA` gives, and their log-densities (B,).

        log π(a|s) = log N(u; μ, σ) - Σ log(1 - tanh²u) (eq. 21), the last term as 2 (log 2 - u - softplus(-2u)), which
        stays finite where tanh rounds to 1.
        """
        mean_BA, log_std_BA = self.layers(observations_BD).chunk(2, dim=-1)
        log_std_BA = log_std_BA.clamp(LOG_STD_MIN, LOG_STD_MAX)
        u_BA = mean_BA + log_std_BA.exp() * noise_BA
        gaussian_BA = -0.5 * noise_BA.square() - log_std_BA - 0.5 * math.log(2 * math.pi)
        log_jacobian_BA = 2 * (math.log(2) - u_BA - F.softplus(-2 * u_BA))
        return torch.tanh(u_BA), (gaussian_BA - log_jacobian_BA).sum(-1)

    def flat_weights(self) -> np.ndarray:
        return parameters_to_vector(self.parameters()).detach().cpu().numpy()


class QCritic(nn.Module):
    """`count` Q functions that share nothing. Takes observation and action side by side (B, X); returns (count, B).

    layer_norm: bounds what a Q function says of actions that nobody took (Ball et al., arXiv 2302.02948, §4.2).
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        activation: Activation,
        layer_norm: bool = False,
        count: int = 1,
    ) -> None:
        super().__init__()
        sizes = [observation_size + action_size, *hidden, 1]
        self.members = nn.ModuleList(plain_mlp(sizes, activation, layer_norm) for _ in range(count))

    def forward(self, observations_actions_BX: Tensor) -> Tensor:
        return torch.stack([member(observations_actions_BX).squeeze(-1) for member in self.members])


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Polyak averaging, in place: target ← target + tau (source - target)."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
