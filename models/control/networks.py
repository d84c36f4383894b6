"""The MLPs of control agents."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from models.control.numpy_policies import Activation

_LAYERS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def mlp(sizes: Sequence[int], activation: Activation, last_gain: float = 1.0) -> nn.Sequential:
    """Linear layers of the given widths, the activation between them.

    Initialisation is orthogonal with gain √2 and zero biases; the last layer has gain `last_gain` (Andrychowicz et
    al., "What matters in on-policy reinforcement learning", arXiv 2006.05990).
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, last_gain if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, _LAYERS[activation]()]
    return nn.Sequential(*layers)


def plain_mlp(sizes: Sequence[int], activation: Activation, layer_norm: bool = False) -> nn.Sequential:
    """The same with torch's own initialisation, which Q functions do better with. layer_norm: in every hidden layer."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
        normed = [nn.LayerNorm(fan_out)] if layer_norm else []
        layers += [nn.Linear(fan_in, fan_out), *normed, _LAYERS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class ValueFunction(nn.Module):
    """(..., D) → values (...)."""

    def __init__(self, observation_size: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        self.net = mlp([observation_size, *hidden, 1], activation)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).squeeze(-1)
