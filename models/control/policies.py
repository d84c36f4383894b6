"""Stochastic policies: a distribution over actions for each observation.

`flat_weights()` is what travels to the workers, which make a numpy policy of it with `numpy_policy(flat)`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from models.control.distributions import Categorical, DiagonalGaussian
from models.control.networks import mlp
from models.control.numpy_policies import (
    VARIANCE_MIN,
    Activation,
    NumpyCategorical,
    NumpyGaussian,
    NumpyStateDependentGaussian,
)


class CategoricalPolicy(nn.Module):
    """Discrete actions. The last layer starts with gain 0.01, so that the first policy is nearly uniform."""

    def __init__(self, observation_size: int, actions: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        sizes = (observation_size, *hidden, actions)
        self.net = mlp(sizes, activation, last_gain=0.01)
        self.numpy_policy: Callable[[np.ndarray], NumpyCategorical] = partial(NumpyCategorical, sizes, activation)

    def forward(self, observations: Tensor) -> Categorical:
        return Categorical(self.net(observations).log_softmax(-1))

    def flat_weights(self) -> np.ndarray:
        return parameters_to_vector(self.parameters()).detach().numpy()


class GaussianPolicy(nn.Module):
    """Continuous actions: a mean for each observation, and one standard deviation for all of them.

    The last layer starts with gain 0.01, so that the first means are nearly 0.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        activation: Activation,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (observation_size, *hidden, action_size)
        self.log_std = nn.Parameter(
            torch.full((action_size,), float(log_std))
        )  # first: NumpyGaussian counts on the order
        self.net = mlp(sizes, activation, last_gain=0.01)
        self.numpy_policy: Callable[[np.ndarray], NumpyGaussian] = partial(NumpyGaussian, sizes, activation)

    def forward(self, observations: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.net(observations), self.log_std)

    def flat_weights(self) -> np.ndarray:
        return parameters_to_vector(self.parameters()).detach().numpy()


class StateDependentGaussianPolicy(nn.Module):
    """Continuous actions with generalised state-dependent exploration, gSDE (Raffin et al., arXiv 2005.05719, §3).

        a = μ(s) + h(s) E      E_ij ~ N(0, σ_ij²), drawn anew only every `hold` steps

    h(s) is the last hidden layer, H wide, and σ (H, A) is learnt. Between two draws the noise is a function of the
    state, so that exploration is as smooth as the policy; each action's own distribution is a Gaussian of variance
    Σ_i h_i² σ_ij² (eq. 9), which is what log-probabilities are taken of. No gradient reaches h by way of the variance.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        activation: Activation,
        log_std: float,
        hold: int,
    ) -> None:
        super().__init__()
        sizes = (observation_size, *hidden, action_size)
        self.log_std = nn.Parameter(torch.full((sizes[-2], action_size), float(log_std)))  # first, as in GaussianPolicy
        self.net = mlp(sizes, activation, last_gain=0.01)
        self.numpy_policy: Callable[[np.ndarray], NumpyStateDependentGaussian] = partial(
            NumpyStateDependentGaussian, sizes, activation, hold
        )

    def forward(self, observations: Tensor) -> DiagonalGaussian:
        features = self.net[:-1](observations)
        variance = features.detach().square() @ (2 * self.log_std).exp() + VARIANCE_MIN
        return DiagonalGaussian(self.net[-1](features), 0.5 * variance.log())

    def flat_weights(self) -> np.ndarray:
        return parameters_to_vector(self.parameters()).detach().numpy()


Policy = CategoricalPolicy | GaussianPolicy | StateDependentGaussianPolicy
