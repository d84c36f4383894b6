"""TRPO: trust region policy optimisation (Schulman et al., arXiv 1502.05477).

    maximise L(θ) = E[ π_θ(a|s) / π_old(a|s) · A ]   subject to   E[ KL(π_old ‖ π_θ) ] ≤ δ

    1. g = ∇L at θ_old. The step along the natural gradient is x = F⁻¹ g, by conjugate gradient on Fisher-vector
       products; F is the Hessian of the KL at θ_old, damped. (Appendix C)
    2. The longest step that a quadratic KL allows is √(2δ / xᵀFx) · x.
    3. Backtracking line search along it, until L has improved and the true KL is at most δ. If no try does, the policy
       stays bit for bit as it was.
    4. The critic is fitted to the λ-returns by minibatches; it has no part in the trust region.

Shapes: B steps, P parameters of the policy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from agents import evaluation, on_policy
from agents.on_policy import (
    AdvantageConfig,
    Batch,
    Learner,
    adam,
    batch,
    explained_variance,
    fit_critic,
    initial_weights,
    make_policy,
)
from agents.rollout import Fragment
from models.control.distributions import Distribution
from models.control.networks import ValueFunction
from models.control.policies import Policy
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class TRPOConfig(AdvantageConfig):
    envs_per_worker: int = 8
    n_steps: int = 128
    gae_lambda: float = 0.98
    max_kl: float = 0.01
    """δ, in nats."""
    kl_schedule: Literal["linear", "constant"] = "constant"
    """linear: δ falls to 0 over the run, as learning rates do."""
    cg_steps: int = 15
    """Of conjugate gradient, at most."""
    cg_damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    line_search_steps: int = 10
    """Tries of the line search, each 0.8 times as long as the one before."""
    critic_lr: float = 1e-3
    critic_epochs: int = 10
    critic_batch: int = 128

    may_be_zero: ClassVar[frozenset[str]] = AdvantageConfig.may_be_zero | {"cg_damping"}


def train(config: TRPOConfig, run: "Run") -> None:
    on_policy.train(config, run, TRPO(config, run.seed))


def evaluate(config: TRPOConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, TRPO(config, run.seed))


class TRPO(Learner):
    config: TRPOConfig

    def __init__(self, config: TRPOConfig, seed: int) -> None:
        super().__init__(config, seed)
        with initial_weights(seed):
            policy = make_policy(config, self.spaces)
            self.critic = ValueFunction(self.spaces.observation_size, config.hidden, config.activation)
        self.networks = {"policy": policy, "critic": self.critic}
        self.optimizers = {"adam": adam((self.critic, config.critic_lr))}

    def update(self, fragment: Fragment) -> dict[str, float]:
        with torch.no_grad():
            values_TN = self.critic(torch.from_numpy(fragment.observations)).numpy()
        steps = batch(fragment, values_TN, self.config)
        max_kl = self.config.max_kl * (self.remaining if self.config.kl_schedule == "linear" else 1)
        metrics = trust_region_step(self.policy, steps, replace(self.config, max_kl=max_kl))
        order = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", self.round))
        epochs, size = self.config.critic_epochs, self.config.critic_batch
        metrics["train/value_loss"] = fit_critic(self.critic, self.optimizers["adam"], steps, epochs, size, order)
        values = torch.from_numpy(values_TN[:-1][fragment.valid])
        return metrics | {"train/explained_variance": explained_variance(steps.targets, values)}


def trust_region_step(policy: Policy, steps: Batch, config: TRPOConfig) -> dict[str, float]:
    """Improve `policy` in place, or leave it bit for bit as it was."""
    parameters = list(policy.parameters())
    pi = policy(steps.observations)
    old = pi.detach()
    old_log_probs = old.log_prob(steps.actions)
    surrogate = _surrogate(pi, old_log_probs, steps)
    gradient = flat_gradient(surrogate, policy)
    fisher = fisher_vector_product(policy, steps.observations, config.cg_damping)
    direction = conjugate_gradient(fisher, gradient, config.cg_steps)
    curvature = direction @ fisher(direction)
    metrics = {
        "train/entropy": old.entropy().mean().item(),
        "train/gradient_norm": gradient.norm().item(),
        "train/kl": 0.0,
        "train/improvement": 0.0,
        "train/line_search_steps": float(config.line_search_steps),
        "train/line_search_failed": 1.0,
    }
    if not curvature > 0:  # also where it is NaN: no step can be measured
        return metrics
    start = parameters_to_vector(parameters).detach().clone()
    step = direction * (2 * config.max_kl / curvature).sqrt()
    with torch.no_grad():
        for tried in range(config.line_search_steps):
            vector_to_parameters(start + 0.8**tried * step, parameters)
            new = policy(steps.observations)
            kl = old.kl(new).mean().item()
            improvement = (_surrogate(new, old_log_probs, steps) - surrogate).item()
            if kl <= config.max_kl and improvement > 0:
                return metrics | {
                    "train/kl": kl,
                    "train/improvement": improvement,
                    "train/line_search_steps": tried + 1.0,
                    "train/line_search_failed": 0.0,
                }
        vector_to_parameters(start, parameters)
    return metrics


def _surrogate(pi: Distribution, old_log_probs: Tensor, steps: Batch) -> Tensor:
    return ((pi.log_prob(steps.actions) - old_log_probs).exp() * steps.advantages).mean()


def flat_gradient(scalar: Tensor, policy: Policy, create_graph: bool = False) -> Tensor:
    """(P,)"""
    gradients = torch.autograd.grad(scalar, list(policy.parameters()), create_graph=create_graph)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def fisher_vector_product(policy: Policy, observations: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    """Returns v ↦ (F + damping · I) v for vectors (P,), where F is the Hessian of the mean KL(π_old ‖ π) at π = π_old.

    Two backward passes: the gradient of (∇KL)ᵀ v (Pearlmutter, 1994). The first is made once for all products.
    """
    pi = policy(observations)
    gradient = flat_gradient(pi.detach().kl(pi).mean(), policy, create_graph=True)
    parameters = list(policy.parameters())

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]) + damping * vector

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """Solve M x = b for a positive definite M that is known by its products (Hestenes and Stiefel, 1952).

    Ends after `steps`, or when |M x - b|² ≤ tolerance.
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(steps):
        if squared <= tolerance:
            break
        image = product(direction)
        length = squared / (direction @ image)
        x += length * direction
        residual -= length * image
        squared, before = residual @ residual, squared
        direction = residual + (squared / before) * direction
    return x
