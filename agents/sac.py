"""SAC: soft actor-critic with a learnt temperature (Haarnoja et al., arXiv 1812.05905, algorithm 1).

The policy maximises return and entropy together, so that it keeps trying things out by itself:

    critics      y = r + γ' (min(Q̄1, Q̄2)(s', a') - α log π(a'|s')),  a' ~ π(s');  both minimise ½ (Qi(s, a) - y)²
    actor        minimise  α log π(a|s) - min(Q1, Q2)(s, a)  with  a = tanh(μ(s) + σ(s) ε), through a      (eq. 9)
    temperature  minimise  -log α · (log π(a|s) + target entropy),  target entropy = -A                    (eq. 18)

The three gradients are taken at the weights before the step. Targets follow the critics; the actor has none.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from agents import evaluation, replay_training
from agents.on_policy import initial_weights
from agents.replay import Transitions
from agents.replay_training import Learner, ReplayConfig
from models.control.q_networks import QCritic, SquashedGaussian, follow

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class SACConfig(ReplayConfig):
    lr: float = 3e-4
    """Learning rate of actor, critics and temperature (Adam)."""
    learning_starts: int = 100
    hidden: tuple[int, ...] = (256, 256)
    initial_alpha: float = 1.0
    """Temperature at the start: what a nat of entropy is worth in reward."""


def train(config: SACConfig, run: "Run") -> None:
    """The `sac` job."""
    replay_training.train(config, run, SAC(config, run.seed, run.device))


def evaluate(config: SACConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, SAC(config, run.seed, run.device))


class Temperature(nn.Module):
    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def alpha(self) -> Tensor:
        return self.log_alpha.detach().exp()


class SAC(Learner):
    config: SACConfig
    drawn = 2

    def __init__(self, config: SACConfig, seed: int, device: str = "cpu") -> None:
        super().__init__(config, seed, device)
        sizes = self.observation_size, self.action_size, config.hidden, config.activation
        self.target_entropy = -float(self.action_size)
        with initial_weights(seed):
            self.actor = SquashedGaussian(*sizes).to(device)
            self.critics = QCritic(*sizes, config.critic_layer_norm, count=2).to(device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = Temperature(config.initial_alpha).to(device)
        self.networks = {
            "actor": self.actor,
            "critics": self.critics,
            "target_critics": self.target_critics,
            "temperature": self.temperature,
        }
        trained = ("actor", "critics", "temperature")
        self.optimizers = {name: self.adam(self.networks[name]) for name in trained}

    def update(self, batch: Transitions, noise_KBA: Tensor) -> dict[str, Tensor]:
        noise_BA, next_noise_BA = noise_KBA
        alpha = self.temperature.alpha()
        value_loss, (policy_loss, entropy) = self.side_by_side(
            lambda: self._critic_gradient(batch, next_noise_BA, alpha),
            lambda: self._actor_gradient(batch, noise_BA, alpha),
        )
        self.temperature.log_alpha.grad = entropy - self.target_entropy
        self.side_by_side(self.optimizers["critics"].step, self.optimizers["actor"].step)
        self.optimizers["temperature"].step()
        follow(self.target_critics, self.critics, self.config.tau)
        return {"value_loss": value_loss, "policy_loss": policy_loss, "entropy": entropy, "alpha": alpha}

    def _critic_gradient(self, batch: Transitions, noise_BA: Tensor, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            next_actions_BA, next_log_probs_B = self.actor(batch.next_observations_BD, noise_BA)
            next_values_2B = self.target_critics(torch.cat([batch.next_observations_BD, next_actions_BA], -1))
            soft_values_B = next_values_2B.amin(0) - alpha * next_log_probs_B
            targets_B = batch.rewards_B + batch.discounts_B * soft_values_B
        loss = 0.5 * (self.critics(batch.observations_actions_BX) - targets_B).square().mean(1).sum()
        self.optimizers["critics"].zero_grad()
        loss.backward()
        return loss.detach()

    def _actor_gradient(self, batch: Transitions, noise_BA: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        actions_BA, log_probs_B = self.actor(batch.observations_BD, noise_BA)
        values_2B = self.critics(torch.cat([batch.observations_BD, actions_BA], -1))
        loss = (alpha * log_probs_B - values_2B.amin(0)).mean()
        self.optimizers["actor"].zero_grad()
        loss.backward(inputs=list(self.actor.parameters()))  # and not the critics' weights
        return loss.detach(), -log_probs_B.detach().mean()
