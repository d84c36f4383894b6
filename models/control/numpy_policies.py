"""The policies of policies.py as numpy, for the workers: on networks this small torch takes several times as long.

A policy plays one step as `act(policy(x_ND), noise_N...)`. All noise of a fragment is drawn beforehand by `noise`, and
all log-probabilities are computed afterwards: per step remains what cannot be done at once.

Shapes: N environments (leading dimensions are free where it says ...), D numbers an observation, K numbers that the
network gives, A actions or numbers an action, H width of the last hidden layer, T steps.
"""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

Activation = Literal["tanh", "relu"]
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # of the squashed Gaussian, before the tanh (Haarnoja et al., arXiv 1812.05905)
VARIANCE_MIN = 1e-6  # of state-dependent noise, added to the variance
LOG_SQRT_2PI = np.float32(0.5 * math.log(2 * math.pi))


class NumpyMLP:
    """The forward pass of `networks.mlp`, from the flat vector that `parameters_to_vector` makes of one."""

    def __init__(self, sizes: Sequence[int], activation: Activation, flat: np.ndarray) -> None:
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []
        self.activation = activation
        offset = 0
        for fan_in, fan_out in itertools.pairwise(sizes):
            weight = flat[offset : offset + fan_in * fan_out].reshape(fan_out, fan_in).T
            offset += fan_in * fan_out
            self.layers.append((np.ascontiguousarray(weight), flat[offset : offset + fan_out]))
            offset += fan_out
        if offset != len(flat):
            raise ValueError(f"{len(flat)} weights for layers of {list(sizes)}, which have {offset}")

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.last(self.features(x_ND))

    def features(self, x_ND: np.ndarray) -> np.ndarray:
        """(N, H): what the last layer gets."""
        for weight, bias in self.layers[:-1]:
            x_ND = x_ND @ weight
            x_ND += bias
            if self.activation == "tanh":
                np.tanh(x_ND, out=x_ND)
            else:
                np.maximum(x_ND, 0, out=x_ND)
        return x_ND

    def last(self, features_NH: np.ndarray) -> np.ndarray:
        weight, bias = self.layers[-1]
        outputs = features_NH @ weight
        outputs += bias
        return outputs


class NumpyCategorical:
    """softmax over A = K logits. Actions are int64 (...)."""

    unit_actions: ClassVar[bool] = False  # whether actions lie in [-1, 1] and are stretched to the bounds

    def __init__(self, sizes: Sequence[int], activation: Activation, flat: np.ndarray) -> None:
        self.net = NumpyMLP(sizes, activation, flat)

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.net(x_ND)

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise, so that the largest of logits + noise is a sample of the softmax."""
        return -np.log(rng.standard_exponential(shape, dtype=np.float32))

    def act(self, logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return (logits + noise).argmax(-1)

    def greedy(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(-1)

    def log_probs(self, logits: np.ndarray, actions: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, actions[..., None], -1)[..., 0]
        return chosen - np.log(np.exp(shifted).sum(-1))


class NumpyGaussian:
    """A diagonal Gaussian around K = A means; the flat vector begins with its log standard deviations (A,)."""

    unit_actions: ClassVar[bool] = False

    def __init__(self, sizes: Sequence[int], activation: Activation, flat: np.ndarray) -> None:
        self.log_std = flat[: sizes[-1]]
        self.std = np.exp(self.log_std)
        self.net = NumpyMLP(sizes, activation, flat[sizes[-1] :])

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.net(x_ND)

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def act(self, mean: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return mean + self.std * noise

    def greedy(self, mean: np.ndarray) -> np.ndarray:
        return mean

    def log_probs(self, mean: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return -(0.5 * ((actions - mean) / self.std) ** 2 + self.log_std + LOG_SQRT_2PI).sum(-1)


class NumpyStateDependentGaussian:
    """`policies.StateDependentGaussianPolicy`: its K = A + H outputs are the means and the features h(s).

    The flat vector begins with the log standard deviations (H, A). The noise of a step is a matrix E (H, A) for each
    environment, the same for `hold` steps.
    """

    unit_actions: ClassVar[bool] = False

    def __init__(self, sizes: Sequence[int], activation: Activation, hold: int, flat: np.ndarray) -> None:
        width, self.size = sizes[-2:]
        self.std_HA = np.exp(flat[: width * self.size]).reshape(width, self.size)
        self.hold = hold
        self.net = NumpyMLP(sizes, activation, flat[width * self.size :])

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        features = self.net.features(x_ND)
        return np.concatenate([self.net.last(features), features], -1)

    def noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """shape: (T, N, K). Returns (T, N, H, A)."""
        steps, environments, _ = shape
        drawn = rng.standard_normal((-(-steps // self.hold), environments, *self.std_HA.shape), dtype=np.float32)
        return np.repeat(drawn * self.std_HA, self.hold, axis=0)[:steps]

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        features = outputs[..., self.size :]
        return outputs[..., : self.size] + (features[..., None, :] @ noise)[..., 0, :]

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[..., : self.size]

    def log_probs(self, outputs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        mean, features = outputs[..., : self.size], outputs[..., self.size :]
        variance = features**2 @ self.std_HA**2 + np.float32(VARIANCE_MIN)
        return -(0.5 * ((actions - mean) ** 2 / variance + np.log(variance)) + LOG_SQRT_2PI).sum(-1)


class NumpyDeterministic:
    """tanh of K = A outputs, in [-1, 1], and noise of standard deviation `std` around it, clipped to [-1, 1]."""

    unit_actions: ClassVar[bool] = True

    def __init__(self, sizes: Sequence[int], activation: Activation, std: float, flat: np.ndarray) -> None:
        self.net = NumpyMLP(sizes, activation, flat)
        self.std = np.float32(std)

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.net(x_ND)

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return (np.tanh(outputs) + self.std * noise).clip(-1, 1)

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        return np.tanh(outputs)

    def log_probs(self, outputs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        raise TypeError("a clipped action has no density")


class NumpySquashedGaussian:
    """The tanh of a Gaussian, in [-1, 1]: K = 2A outputs, its means and the logarithms of its standard deviations."""

    unit_actions: ClassVar[bool] = True

    def __init__(self, sizes: Sequence[int], activation: Activation, flat: np.ndarray) -> None:
        self.net = NumpyMLP(sizes, activation, flat)

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        return self.net(x_ND)

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal((*shape[:-1], shape[-1] // 2), dtype=np.float32)

    def act(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        mean, log_std = np.split(outputs, 2, axis=-1)
        return np.tanh(mean + np.exp(log_std.clip(LOG_STD_MIN, LOG_STD_MAX)) * noise)

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        return np.tanh(outputs[..., : outputs.shape[-1] // 2])

    def log_probs(self, outputs: np.ndarray, actions: np.ndarray) -> np.ndarray:
        raise TypeError("SAC's learner draws its own actions: the density of those that were played is not kept")


NumpyPolicy = (
    NumpyCategorical | NumpyGaussian | NumpyStateDependentGaussian | NumpyDeterministic | NumpySquashedGaussian
)
