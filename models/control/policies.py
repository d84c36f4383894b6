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
from models.control.numpy_policies import Activation, NumpyCategorical, NumpyGaussian


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


Policy = CategoricalPolicy | GaussianPolicy
