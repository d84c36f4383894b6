"""QAC: online actor-critic with an action-value critic (Sutton and Barto, 2018, chapter 13; Sutton et al., 1999).

    after every step of the environments:
      critic:  one step towards r + γ Q(s', a'), where a' is the action taken next (SARSA)
      actor:   one step along (Q(s, a) - E_a~π[Q(s, a)]) · ∇log π(a|s)

The policy gradient theorem asks for Q(s, a) ∇log π(a|s). Subtracting the state's mean of Q changes nothing in
expectation and much in variance; it is exact for discrete actions and a sampled mean for continuous ones. What is left
is divided by its standard deviation over the environments (not centred: the state's mean was), so that the size of the
rewards is not that of the actor's steps; one alone stays as it is.

a' exists for every step: at the end of an episode that a time limit cut, the policy has drawn one for the true final
observation, though it is not played; for the last step of a fragment it is drawn here.

Shapes: N environments, B valid ones among them, A actions or numbers an action.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from agents import evaluation, on_policy
from agents.on_policy import Learner, OnPolicyConfig, adam, descend, initial_weights, make_policy
from agents.rollout import Fragment
from envs.control.spaces import ControlSpaces, DiscreteActions
from models.control.distributions import Categorical, Distribution
from models.control.networks import mlp
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class QACConfig(OnPolicyConfig):
    envs_per_worker: int = 16
    n_steps: int = 8
    """Updates to one call of the workers: one for each step."""
    lr: float = 1e-4
    """Learning rate of the actor (Adam). Much smaller than the critic's: an actor that follows a critic of which little
    is known yet may end at a single action, and then nothing tells it of the others."""
    critic_lr: float = 4e-3
    ent_coef: float = 0.03
    max_grad_norm: float = 0.5
    """Of the actor's gradient, and of the critic's."""

    may_be_zero: ClassVar[frozenset[str]] = OnPolicyConfig.may_be_zero | {"ent_coef"}


def train(config: QACConfig, run: "Run") -> None:
    on_policy.train(config, run, QAC(config, run.seed))


def evaluate(config: QACConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, QAC(config, run.seed))


class QAC(Learner):
    config: QACConfig

    def __init__(self, config: QACConfig, seed: int) -> None:
        super().__init__(config, seed)
        with initial_weights(seed):
            policy = make_policy(config, self.spaces)
            self.critic = ActionValues(self.spaces, config)
        self.networks = {"policy": policy, "critic": self.critic}
        self.optimizers = {"adam": adam((policy, config.lr), (self.critic, config.critic_lr))}

    def update(self, fragment: Fragment) -> dict[str, float]:
        """One update for each step."""
        self.generator = torch.Generator().manual_seed(derive_seed(self.seed, "drawn by the learner", self.round))
        last = torch.from_numpy(fragment.observations[-1])
        with torch.no_grad():
            after_last = self.policy(last).sample(self.generator)
        actions = [*torch.from_numpy(fragment.actions), after_last]
        sums: dict[str, float] = {}
        for t in range(len(fragment.rewards)):
            if fragment.valid[t].any():
                for name, value in self.update_on(fragment.steps(t, t + 1), actions[t + 1]).items():
                    sums[name] = sums.get(name, 0.0) + value / len(fragment.rewards)
        return sums

    def update_on(self, step: Fragment, next_actions: Tensor) -> dict[str, float]:
        """step: a fragment of one step. next_actions: (N,) or (N, A)."""
        valid = torch.from_numpy(step.valid[0])
        observations, after = (torch.from_numpy(observations)[valid] for observations in step.observations)
        actions = torch.from_numpy(step.actions[0])[valid]
        with torch.no_grad():
            later = self.critic(after, next_actions[valid])
        discounts = torch.from_numpy(np.float32(self.config.gamma) * ~step.terminated[0])[valid]
        targets = torch.from_numpy(step.rewards[0])[valid] + discounts * later
        q = self.critic(observations, actions)
        value_loss = (q - targets).square().mean()

        pi = self.policy(observations)
        with torch.no_grad():
            advantages = q.detach() - self.critic.mean(observations, pi, self.generator)
            if len(advantages) > 1:  # one has no spread, and would count a thousandfold
                advantages /= advantages.std(correction=0) + 1e-3
        policy_loss = -(advantages * pi.log_prob(actions)).mean()
        entropy = pi.entropy().mean()
        loss = policy_loss - self.config.ent_coef * entropy + value_loss  # the networks share nothing
        descend(self.optimizers["adam"], loss, self.config.max_grad_norm)
        return {
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": entropy.item(),
            "train/q_mean": q.mean().item(),
        }


class ActionValues(nn.Module):
    """Q(s, a): one output for each discrete action, or one of observation and continuous action together."""

    def __init__(self, spaces: ControlSpaces, config: OnPolicyConfig) -> None:
        super().__init__()
        self.discrete = isinstance(spaces.actions, DiscreteActions)
        if isinstance(spaces.actions, DiscreteActions):
            sizes = [spaces.observation_size, *config.hidden, spaces.actions.count]
        else:
            sizes = [spaces.observation_size + spaces.actions.size, *config.hidden, 1]
        self.net = mlp(sizes, config.activation)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(B, D) and (B,) or (B, A) → (B,)"""
        if self.discrete:
            return self.net(observations).gather(-1, actions[..., None]).squeeze(-1)
        return self.net(torch.cat([observations, actions], -1)).squeeze(-1)

    def mean(self, observations: Tensor, pi: Distribution, generator: torch.Generator, samples: int = 8) -> Tensor:
        """E_a~π[Q(s, a)], (B,)."""
        if isinstance(pi, Categorical):
            return (pi.log_probs.exp() * self.net(observations)).sum(-1)
        return torch.stack([self(observations, pi.sample(generator)) for _ in range(samples)]).mean(0)
