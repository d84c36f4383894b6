"""Action distributions of the policies, with the quantities that policy gradients need.

Shapes: leading dimensions are free (...), A actions or numbers an action.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Categorical:
    log_probs: Tensor  # (..., A), normalised

    def log_prob(self, actions: Tensor) -> Tensor:
        """actions: (...) int64."""
        return self.log_probs.gather(-1, actions[..., None]).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def kl(self, other: "Categorical") -> Tensor:
        """KL(self ‖ other)."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        gumbel = -torch.empty_like(self.log_probs).exponential_(generator=generator).log()
        return (self.log_probs + gumbel).argmax(-1)

    def detach(self) -> "Categorical":
        return Categorical(self.log_probs.detach())


@dataclass(frozen=True)
class DiagonalGaussian:
    mean: Tensor  # (..., A)
    log_std: Tensor  # (A,), or (..., A) where it depends on the observation

    def log_prob(self, actions: Tensor) -> Tensor:
        """actions: (..., A), before they are clipped to the environment's bounds."""
        z = (actions - self.mean) * (-self.log_std).exp()
        return -(0.5 * z.square() + self.log_std + LOG_SQRT_2PI).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 + LOG_SQRT_2PI).sum(-1).expand(self.mean.shape[:-1])

    def kl(self, other: "DiagonalGaussian") -> Tensor:
        """KL(self ‖ other)."""
        spread = (2 * (self.log_std - other.log_std)).exp() - 1
        distance = (self.mean - other.mean).square() * (-2 * other.log_std).exp()
        return (other.log_std - self.log_std + 0.5 * (spread + distance)).sum(-1)

    def sample(self, generator: torch.Generator) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def detach(self) -> "DiagonalGaussian":
        return DiagonalGaussian(self.mean.detach(), self.log_std.detach())


Distribution = Categorical | DiagonalGaussian
