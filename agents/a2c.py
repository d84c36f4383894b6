"""A2C: advantage actor-critic (Mnih et al., arXiv 1602.01783), the synchronous form, with GAE or n-step returns.

    workers play `segments` segments of `n_steps` steps each ──▶ for each segment: advantages, `critic_steps` steps of
    the critic on the squared advantage, one step of the actor along advantage · ∇log π + ent_coef · ∇entropy ──▶ ...

The critic learns faster than the actor (two time scales: Konda and Tsitsiklis, 2000). With one rate for both the
policy reaches CartPole's maximum as soon and then falls off it again in a third of the seeds. Where an action matters
little beside the critic's errors (Pendulum), the critic needs several steps to each of the actor.

The segments of a call were played by the policy of its beginning, so that the last one is `segments - 1` updates old,
with `overlap` twice `segments` less one; `train/policy_lag_kl` shows how far the policy has moved.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from agents import evaluation, on_policy
from agents.on_policy import AdvantageConfig, Learner, adam, batch, descend, initial_weights, make_policy
from agents.rollout import Fragment
from models.control.networks import ValueFunction

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class A2CConfig(AdvantageConfig):
    segments: int = 4
    """Updates to one call of the workers."""
    overlap: bool = False
    """The workers play the next call while the learner learns from this one, by the policy from before it. For
    environments and updates that take about as long; what it does to the lag is in `train/policy_lag_kl`."""
    lr: float = 5e-4
    """Learning rate of the actor (Adam)."""
    critic_lr: float = 2e-3
    critic_steps: int = 1
    """Of the critic's gradient descent on the returns of one segment."""
    ent_coef: float = 0.01
    normalize_advantages: bool = True
    """Within each update, to mean 0 and standard deviation 1."""
    max_grad_norm: float = 0.5
    """Of the actor's gradient, and of the critic's."""

    may_be_zero: ClassVar[frozenset[str]] = AdvantageConfig.may_be_zero | {"ent_coef"}

    @property
    def steps_per_call(self) -> int:
        return self.n_steps * self.segments


def train(config: A2CConfig, run: "Run") -> None:
    on_policy.train(config, run, A2C(config, run.seed), config.overlap)


def evaluate(config: A2CConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, A2C(config, run.seed))


class A2C(Learner):
    config: A2CConfig

    def __init__(self, config: A2CConfig, seed: int) -> None:
        super().__init__(config, seed)
        with initial_weights(seed):
            policy = make_policy(config, self.spaces)
            self.critic = ValueFunction(self.spaces.observation_size, config.hidden, config.activation)
        self.networks = {"policy": policy, "critic": self.critic}
        self.optimizers = {"adam": adam((policy, config.lr), (self.critic, config.critic_lr))}

    def update(self, fragment: Fragment) -> dict[str, float]:
        """One update for each segment."""
        sums: dict[str, float] = {}
        for begin in range(0, len(fragment.actions), self.config.n_steps):
            segment = fragment.steps(begin, begin + self.config.n_steps)
            if segment.valid.any():
                for name, value in self.update_on(segment).items():
                    sums[name] = sums.get(name, 0.0) + value / self.config.segments
        return sums

    def update_on(self, segment: Fragment) -> dict[str, float]:
        values_TN = self.critic(torch.from_numpy(segment.observations))
        steps = batch(segment, values_TN.detach().numpy(), self.config, self.config.normalize_advantages)
        value_loss = (values_TN[:-1][torch.from_numpy(segment.valid)] - steps.targets).square().mean()

        pi = self.policy(steps.observations)
        log_probs = pi.log_prob(steps.actions)
        policy_loss = -(steps.advantages * log_probs).mean()
        entropy = pi.entropy().mean()
        loss = policy_loss - self.config.ent_coef * entropy + value_loss  # the networks share nothing
        descend(self.optimizers["adam"], loss, self.config.max_grad_norm)
        for _ in range(self.config.critic_steps - 1):  # the policy has no gradient here, and stays
            again = (self.critic(steps.observations) - steps.targets).square().mean()
            descend(self.optimizers["adam"], again, self.config.max_grad_norm)
        return {
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": entropy.item(),
            "train/policy_lag_kl": (steps.log_probs - log_probs.detach()).mean().item(),
        }
