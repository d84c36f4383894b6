"""A2C: advantage actor-critic (Mnih et al., arXiv 1602.01783), the synchronous form.

    workers play `segments` segments of `n_steps` steps each ──▶ for each segment: advantages, one step of the critic
    on the squared advantage, one step of the actor along advantage · ∇log π + ent_coef · ∇entropy ──▶ new weights

Shapes: T steps, N environments of all workers, D numbers an observation, A actions.

The critic learns faster than the actor (two time scales: Konda and Tsitsiklis, 2000). With one rate for both the
policy reaches CartPole's maximum as soon and then falls off it again in a third of the seeds.

The segments of a call were played by the policy of its beginning, so that the last one is `segments - 1` updates old;
`train/policy_lag_kl` shows how far the policy has moved.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

from agents.returns import gae
from agents.rollout import Fragment, RolloutWorker, call_each, join
from envs.control.vector_env import control_spaces
from models.control.actor_critic import ActorCritic
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run


@dataclass(frozen=True)
class A2CConfig:
    env: str = "CartPole-v1"
    """Gymnasium id; `module:Id-v0` imports the module first."""
    steps: int = 300_000
    """Environment steps, over all workers."""
    workers: int = 2
    envs_per_worker: int = 8
    n_steps: int = 8
    """Steps of each environment to one update."""
    segments: int = 4
    """Updates to one call of the workers."""
    lr: float = 5e-4
    """Learning rate of the actor (Adam), falling linearly to 0."""
    critic_lr: float = 2e-3
    """Learning rate of the critic, falling with it."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.01
    max_grad_norm: float = 0.5
    """Of the actor's gradient, and of the critic's."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, of the actor and of the critic."""
    eval_episodes: int = 100
    eval_every: int = 50_000
    """Environment steps from one evaluation and checkpoint to the next."""
    log_every: int = 10_000
    """Environment steps from one line of metrics to the next."""
    worker_timeout_s: float = 120.0
    """A call that takes a worker longer ends the worker, and is repeated by a new one."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag = f"--{name.replace('_', '-')} is {value}"
            if name == "ent_coef":
                if value < 0:
                    raise UserError(f"{flag}: must not be negative")
            elif name == "hidden":
                if min(value, default=1) < 1:
                    raise UserError(f"{flag}: widths must be positive")
            elif name != "env" and value <= 0:
                raise UserError(f"{flag}: must be positive")
            if name in ("gamma", "gae_lambda") and value > 1:
                raise UserError(f"{flag}: must be at most 1")


def train(config: A2CConfig, run: "Run") -> None:
    """The `a2c` job. Metrics are logged by environment steps; `eval/...` in summary.json are those of the last policy.

    Each checkpoint ends the running episodes, so that what follows it depends on the checkpoint alone: a resumed run
    repeats an uninterrupted one bit for bit, with any number of workers that stay alive.
    """
    torch.set_num_threads(1)  # the networks are too small to be shared among threads
    learner = Learner(config, run.seed)
    workers = start_workers(config, run)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
    clock, last_logged = time.perf_counter(), learner.env_steps
    restart = True
    while learner.env_steps < config.steps:
        call = (learner.policy_weights(), config.n_steps * config.segments, learner.round, restart)
        fragment = join(call_each(workers, "collect", [call] * len(workers), config.worker_timeout_s))
        before = learner.env_steps
        metrics = learner.update(fragment)
        finished = learner.env_steps >= config.steps
        restart = finished or learner.env_steps // config.eval_every > before // config.eval_every
        if restart:
            seed = derive_seed(run.seed, "evaluation", learner.round)
            metrics = evaluation(config, workers, learner.policy_weights(), seed) | metrics
        if restart or learner.env_steps // config.log_every > before // config.log_every:
            now = time.perf_counter()
            metrics["time/env_steps_per_s"] = (learner.env_steps - last_logged) / (now - clock)
            metrics["run/actor_restarts"] = float(workers.restarts)
            clock, last_logged = now, learner.env_steps
            run.log(learner.env_steps, metrics, config.steps)
        if restart:
            run.save(learner.env_steps, learner.state(), score=metrics["eval/return_mean"])
            run.summarize({name: value for name, value in metrics.items() if name.startswith("eval/")})


def evaluate(config: A2CConfig, run: "Run") -> None:
    """Play `eval_episodes` episodes of the greedy policy of the run's checkpoint."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    learner = Learner(config, run.seed)
    learner.load_state(state)
    metrics = evaluation(
        config, start_workers(config, run), learner.policy_weights(), derive_seed(run.seed, "evaluate")
    )
    run.log(learner.env_steps, metrics)
    run.summarize(metrics)


def start_workers(config: A2CConfig, run: "Run") -> "ActorGroup":
    spaces = control_spaces(config.env)
    arguments = (config.env, config.envs_per_worker, spaces, config.hidden, run.seed)
    return run.actors(RolloutWorker, config.workers, {"cpu": 1}, *arguments, name="rollout")


def evaluation(config: A2CConfig, workers: "ActorGroup", weights: np.ndarray, seed: int) -> dict[str, float]:
    shares = [len(share) for share in np.array_split(np.arange(config.eval_episodes), len(workers))]
    calls = [(weights, episodes, seed) for episodes in shares]
    returns = np.concatenate(call_each(workers, "evaluate", calls, config.worker_timeout_s))
    return {"eval/return_mean": float(returns.mean()), "eval/return_std": float(returns.std())}


class Learner:
    """Networks, optimizers and counters: all that a checkpoint has to hold."""

    def __init__(self, config: A2CConfig, seed: int) -> None:
        self.config = config
        spaces = control_spaces(config.env)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "initial weights"))
            self.net = ActorCritic(spaces.observation_size, spaces.actions, config.hidden)
        self.actor_optimizer = torch.optim.Adam(self.net.actor.parameters(), lr=config.lr, eps=1e-5, fused=True)
        self.critic_optimizer = torch.optim.Adam(
            self.net.critic.parameters(), lr=config.critic_lr, eps=1e-5, fused=True
        )
        self.env_steps = 0
        self.round = 0  # calls of the workers so far
        self.returns: deque[float] = deque(maxlen=100)  # of the latest episodes

    def policy_weights(self) -> np.ndarray:
        return parameters_to_vector(self.net.actor.parameters()).detach().numpy()

    def update(self, fragment: Fragment) -> dict[str, float]:
        """One update for each segment. Raises UserError if the loss is not finite."""
        config = self.config
        remaining = max(0.0, 1 - self.env_steps / config.steps)
        self.actor_optimizer.param_groups[0]["lr"] = config.lr * remaining
        self.critic_optimizer.param_groups[0]["lr"] = config.critic_lr * remaining
        sums: dict[str, float] = {}
        for begin in range(0, len(fragment.actions), config.n_steps):
            segment = fragment.steps(begin, begin + config.n_steps)
            if segment.valid.any():
                for name, value in self._update(segment).items():
                    sums[name] = sums.get(name, 0.0) + value / config.segments
        self.env_steps += int(fragment.valid.sum())
        self.round += 1
        if not np.isfinite(list(sums.values())).all():
            raise UserError(
                f"the loss is not finite at step {self.env_steps}: the last checkpoint is good; try a lower --lr"
            )
        self.returns.extend(fragment.episode_returns.tolist())
        return ({"train/return_mean": float(np.mean(self.returns))} if self.returns else {}) | sums

    def _update(self, segment: Fragment) -> dict[str, float]:
        observations_TND = torch.from_numpy(segment.observations)
        weights_TN = torch.from_numpy(segment.valid / segment.valid.sum(dtype=np.float32))  # a mean over valid steps

        values_TN = self.net.values(observations_TND)
        advantages, targets = self._advantages(segment, values_TN.detach().numpy())
        value_loss = (weights_TN * (values_TN[:-1] - torch.from_numpy(targets)).square()).sum()
        _step(self.critic_optimizer, value_loss, self.config.max_grad_norm)

        log_probs_TNA = self.net.log_probs(observations_TND[:-1])
        log_probs_TN = log_probs_TNA.gather(-1, torch.from_numpy(segment.actions)[..., None]).squeeze(-1)
        policy_loss = -(weights_TN * torch.from_numpy(advantages) * log_probs_TN).sum()
        entropy = -(weights_TN[..., None] * log_probs_TNA.exp() * log_probs_TNA).sum()
        _step(self.actor_optimizer, policy_loss - self.config.ent_coef * entropy, self.config.max_grad_norm)

        lag = weights_TN * (torch.from_numpy(segment.log_probs) - log_probs_TN.detach())
        return {
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": entropy.item(),
            "train/policy_lag_kl": lag.sum().item(),
        }

    def _advantages(self, segment: Fragment, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns advantages (T, N), normalised over the valid steps, and the critic's targets, the λ-returns."""
        flags = segment.terminated, segment.truncated
        advantages = gae(segment.rewards, values, *flags, self.config.gamma, self.config.gae_lambda)
        targets = advantages + values[:-1]
        counted = advantages[segment.valid]
        return (advantages - counted.mean()) / (counted.std() + 1e-8), targets

    def state(self) -> dict[str, Any]:
        return {
            "env": self.config.env,
            "env_steps": self.env_steps,
            "round": self.round,
            "returns": list(self.returns),
            "net": self.net.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of another environment or other network sizes."""
        if state["env"] != self.config.env:
            raise UserError(f"the checkpoint is of {state['env']}, not of {self.config.env}: give --env {state['env']}")
        try:
            self.net.load_state_dict(state["net"])
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's network is not that of --hidden {self.config.hidden}: {error}"
            ) from error
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.env_steps, self.round = state["env_steps"], state["round"]
        self.returns.extend(state["returns"])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
