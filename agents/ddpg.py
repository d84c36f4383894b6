"""DDPG: deep deterministic policy gradient (Lillicrap et al., arXiv 1509.02971, algorithm 1).

One gradient step on a batch of transitions (s, a, r, γ', s') from the replay buffer, γ' = 0 after a terminal state:

    critic   minimise  (Q(s, a) - y)²   with  y = r + γ' Q̄(s', μ̄(s'))
    actor    maximise  Q(s, μ(s))       the deterministic policy gradient (Silver et al., 2014):  ∇μ(s) · ∇_a Q(s, a)
    targets  Q̄ ← Q̄ + τ (Q - Q̄)  and  μ̄ ← μ̄ + τ (μ - μ̄)

Both gradients are taken at the weights before the step, so that they can be computed side by side. (The paper's actor
sees the critic one step of Adam later.)

As it is done today, actions enter the critic at its first layer, and there is neither batch normalisation nor weight
decay.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from agents import evaluation, replay_training
from agents.noise import OrnsteinUhlenbeck
from agents.on_policy import initial_weights
from agents.replay import Transitions
from agents.replay_training import Learner, ReplayConfig
from models.control.q_networks import DeterministicActor, QCritic, follow

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class DDPGConfig(ReplayConfig):
    noise: Literal["gaussian", "ou"] = "gaussian"
    """Added to the actions, which are in [-1, 1]: independent, or an Ornstein-Uhlenbeck process."""
    noise_std: float = 0.1
    ou_theta: float = 0.15
    """How fast the Ornstein-Uhlenbeck process returns to 0, a second; a step is 0.01 s."""

    of_the_policy: ClassVar[tuple[str, ...]] = ("activation", "noise", "noise_std", "ou_theta")


def train(config: DDPGConfig, run: "Run") -> None:
    """The `ddpg` job."""
    replay_training.train(config, run, DDPG(config, run.seed, run.device))


def evaluate(config: DDPGConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, DDPG(config, run.seed, run.device))


class DDPG(Learner):
    config: DDPGConfig

    def __init__(self, config: DDPGConfig, seed: int, device: str = "cpu") -> None:
        super().__init__(config, seed, device)
        if config.noise == "ou":
            self.noise = OrnsteinUhlenbeck(config.ou_theta)
        sizes = self.observation_size, self.action_size, config.hidden, config.activation
        with initial_weights(seed):
            self.actor = DeterministicActor(*sizes, config.noise_std).to(device)
            self.critic = QCritic(*sizes, config.critic_layer_norm).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_optimizer = self.adam(self.actor)
        self.critic_optimizer = self.adam(self.critic)
        self.networks = {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self.target_actor,
            "target_critic": self.target_critic,
        }
        self.optimizers = {"actor": self.actor_optimizer, "critic": self.critic_optimizer}

    def update(self, batch: Transitions, noise_KBA: Tensor) -> dict[str, Tensor]:
        value_loss, mean_value = self.side_by_side(
            lambda: self._critic_gradient(batch), lambda: self._actor_gradient(batch)
        )
        self.side_by_side(self._critic_step, self._actor_step)
        return {"value_loss": value_loss, "q_mean": mean_value}

    def _critic_gradient(self, batch: Transitions) -> Tensor:
        with torch.no_grad():
            next_actions_BA = self.target_actor(batch.next_observations_BD)
            (next_values_B,) = self.target_critic(torch.cat([batch.next_observations_BD, next_actions_BA], -1))
            targets_B = batch.rewards_B + batch.discounts_B * next_values_B
        (values_B,) = self.critic(batch.observations_actions_BX)
        loss = (values_B - targets_B).square().mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def _actor_gradient(self, batch: Transitions) -> Tensor:
        actions_BA = self.actor(batch.observations_BD)
        (values_B,) = self.critic(torch.cat([batch.observations_BD, actions_BA], -1))
        mean_value = values_B.mean()
        self.actor_optimizer.zero_grad()
        (-mean_value).backward(inputs=list(self.actor.parameters()))  # and not the critic's weights
        return mean_value.detach()

    def _critic_step(self) -> None:
        self.critic_optimizer.step()
        follow(self.target_critic, self.critic, self.config.tau)

    def _actor_step(self) -> None:
        self.actor_optimizer.step()
        follow(self.target_actor, self.actor, self.config.tau)
