"""PPO: proximal policy optimisation with the clipped objective (Schulman et al., arXiv 1707.06347, eq. 7).

    maximise E[ min(r·A, clip(r, 1 - ε, 1 + ε)·A) ] + ent_coef · entropy,   r = π_θ(a|s) / π_old(a|s)

over `epochs` passes of minibatches through one fragment; the critic is fitted to the λ-returns on the same minibatches.
After an epoch that ends farther than `max_kl` from the policy that played there is no other.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agents import evaluation, on_policy
from agents.on_policy import (
    AdvantageConfig,
    Learner,
    adam,
    batch,
    descend,
    explained_variance,
    initial_weights,
    make_policy,
)
from agents.rollout import Fragment
from models.control.networks import ValueFunction
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class PPOConfig(AdvantageConfig):
    n_steps: int = 64
    lr: float = 1e-3
    """Learning rate of actor and critic (Adam)."""
    epochs: int = 10
    minibatch: int = 256
    """Steps."""
    clip: float = 0.2
    """ε"""
    ent_coef: float = 0.0
    max_kl: float = 0.03
    max_grad_norm: float = 0.5
    """Of the actor's gradient, and of the critic's."""

    may_be_zero: ClassVar[frozenset[str]] = AdvantageConfig.may_be_zero | {"ent_coef"}


def train(config: PPOConfig, run: "Run") -> None:
    on_policy.train(config, run, PPO(config, run.seed))


def evaluate(config: PPOConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, PPO(config, run.seed))


class PPO(Learner):
    config: PPOConfig

    def __init__(self, config: PPOConfig, seed: int) -> None:
        super().__init__(config, seed)
        with initial_weights(seed):
            policy = make_policy(config, self.spaces)
            self.critic = ValueFunction(self.spaces.observation_size, config.hidden, config.activation)
        self.networks = {"policy": policy, "critic": self.critic}
        self.optimizers = {"adam": adam((policy, config.lr), (self.critic, config.lr))}

    def update(self, fragment: Fragment) -> dict[str, float]:
        config = self.config
        with torch.no_grad():
            values_TN = self.critic(torch.from_numpy(fragment.observations)).numpy()
        steps = batch(fragment, values_TN, config)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", self.round))
        epochs, kl = 0, 0.0
        while epochs < config.epochs and kl <= config.max_kl:
            for chosen in torch.randperm(len(steps.actions), generator=generator).split(config.minibatch):
                pi = self.policy(steps.observations[chosen])
                log_ratios = pi.log_prob(steps.actions[chosen]) - steps.log_probs[chosen]
                objective, clipped = clipped_objective(log_ratios, steps.advantages[chosen], config.clip)
                entropy = pi.entropy().mean()
                value_loss = (self.critic(steps.observations[chosen]) - steps.targets[chosen]).square().mean()
                loss = -objective - config.ent_coef * entropy + value_loss  # the networks share nothing
                descend(self.optimizers["adam"], loss, config.max_grad_norm)
            epochs, kl = epochs + 1, self._kl(steps)
        return {
            "train/policy_loss": -objective.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": entropy.item(),
            "train/clipped": clipped.item(),
            "train/kl": kl,
            "train/epochs": float(epochs),
            "train/explained_variance": explained_variance(
                steps.targets, torch.from_numpy(values_TN[:-1][fragment.valid])
            ),
        }

    @torch.no_grad()
    def _kl(self, steps: on_policy.Batch) -> float:
        """E[(r - 1) - log r], which is not negative and has little variance (Schulman, "Approximating KL", 2020)."""
        log_ratios = self.policy(steps.observations).log_prob(steps.actions) - steps.log_probs
        return (log_ratios.exp() - 1 - log_ratios).mean().item()


def clipped_objective(log_ratios: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Of steps (B,). Returns the mean objective, and the share of the steps whose ratio was clipped."""
    ratios = log_ratios.exp()
    objective = torch.min(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages).mean()
    return objective, ((ratios - 1).abs() > clip).float().mean()
