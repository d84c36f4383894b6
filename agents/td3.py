"""TD3: twin delayed deep deterministic policy gradient (Fujimoto et al., arXiv 1802.09477, algorithm 1).

DDPG with three remedies against values that are too high:

    twin critics       y = r + γ' min(Q̄1(s', a'), Q̄2(s', a'));  both minimise (Qi(s, a) - y)²
    smoothed targets   a' = μ̄(s') + clip(N(0, target_noise²), ±target_noise_clip), clipped to [-1, 1]
    delay              the actor, along ∇Q1(s, μ(s)), and all targets take one step to `policy_delay` of the critics

As in agents/ddpg.py both gradients are taken at the weights before the step.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from agents import evaluation, replay_training
from agents.on_policy import initial_weights
from agents.replay import Transitions
from agents.replay_training import Learner, ReplayConfig
from models.control.q_networks import DeterministicActor, QCritic, follow

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class TD3Config(ReplayConfig):
    noise_std: float = 0.1
    """Of the Gaussian noise that is added to the actions, which are in [-1, 1]."""
    policy_delay: int = 2
    """Critic steps to one step of the actor and of the target networks."""
    target_noise: float = 0.2
    target_noise_clip: float = 0.5

    of_the_policy: ClassVar[tuple[str, ...]] = ("activation", "noise_std")


def train(config: TD3Config, run: "Run") -> None:
    """The `td3` job."""
    replay_training.train(config, run, TD3(config, run.seed, run.device))


def evaluate(config: TD3Config, run: "Run") -> None:
    evaluation.evaluate(config, run, TD3(config, run.seed, run.device))


class TD3(Learner):
    config: TD3Config
    drawn = 1

    def __init__(self, config: TD3Config, seed: int, device: str = "cpu") -> None:
        super().__init__(config, seed, device)
        sizes = self.observation_size, self.action_size, config.hidden, config.activation
        with initial_weights(seed):
            self.actor = DeterministicActor(*sizes, config.noise_std).to(device)
            self.critics = QCritic(*sizes, config.critic_layer_norm, count=2).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.actor_optimizer = self.adam(self.actor)
        self.critic_optimizer = self.adam(self.critics)
        self.networks = {
            "actor": self.actor,
            "critics": self.critics,
            "target_actor": self.target_actor,
            "target_critics": self.target_critics,
        }
        self.optimizers = {
            "actor": self.actor_optimizer,
            "critics": self.critic_optimizer,
        }

    def phase(self) -> int:
        """0: the actor's turn too."""
        return int(self.gradient_steps % self.config.policy_delay > 0)

    def update(self, batch: Transitions, noise_KBA: Tensor) -> dict[str, Tensor]:
        noise_BA = self.config.target_noise * noise_KBA[0]
        noise_BA = noise_BA.clamp(-self.config.target_noise_clip, self.config.target_noise_clip)
        if self.phase():
            value_loss = self._critic_gradient(batch, noise_BA)
            self.critic_optimizer.step()
            return {"value_loss": value_loss}
        value_loss, mean_value = self.side_by_side(
            lambda: self._critic_gradient(batch, noise_BA), lambda: self._actor_gradient(batch)
        )
        self.side_by_side(self.critic_optimizer.step, self.actor_optimizer.step)
        follow(self.target_critics, self.critics, self.config.tau)
        follow(self.target_actor, self.actor, self.config.tau)
        return {"value_loss": value_loss, "q_mean": mean_value}

    def _critic_gradient(self, batch: Transitions, noise_BA: Tensor) -> Tensor:
        with torch.no_grad():
            next_actions_BA = (self.target_actor(batch.next_observations_BD) + noise_BA).clamp(-1, 1)
            next_values_2B = self.target_critics(torch.cat([batch.next_observations_BD, next_actions_BA], -1))
            targets_B = batch.rewards_B + batch.discounts_B * next_values_2B.amin(0)
        loss = (self.critics(batch.observations_actions_BX) - targets_B).square().mean(1).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def _actor_gradient(self, batch: Transitions) -> Tensor:
        actions_BA = self.actor(batch.observations_BD)
        values_B = self.critics.members[0](torch.cat([batch.observations_BD, actions_BA], -1))
        mean_value = values_B.mean()
        self.actor_optimizer.zero_grad()
        (-mean_value).backward(inputs=list(self.actor.parameters()))  # and not the critic's weights
        return mean_value.detach()
