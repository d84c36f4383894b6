"""The loop of the agents that learn from a replay buffer (DDPG, TD3, SAC): they collect while they learn.

    worker    plays fragment k+1 with the weights after update k-1 ──┐         (nobody waits unless the other is slower)
    learner   fragment k ──▶ replay ──▶ gradient steps on random batches ──▶ weights after update k ──▶ fragment k+2

Fragments are taken in the order in which they were asked for, so a run depends on its seed alone, with any number of
workers. Before each evaluation the calls under way are used up, and after it new episodes begin: a checkpoint then has
no environments and no noise in it, and a resumed run repeats an uninterrupted one bit for bit.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from agents.experience import Experience, ExperienceWorker
from agents.exploration import Exploration
from agents.pipeline import Pipeline
from agents.replay import ReplayBuffer, ReplayFiles, Transitions
from agents.rollout import call_each
from envs.control.box_spaces import box_spaces
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run


@dataclass(frozen=True)
class ReplayConfig:
    env: str = "Pendulum-v1"
    """Gymnasium id; `module:Id-v0` imports the module first."""
    steps: int = 20_000
    """Environment steps, over all workers."""
    workers: int = 1
    envs_per_worker: int = 1
    fragment_steps: int = 32
    """Steps of each environment to one call of a worker; the policy that plays is up to two fragments old."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer holds."""
    learning_starts: int = 10_000
    """Environment steps with uniformly random actions before the first gradient step."""
    gradient_steps: float = 1.0
    """Gradient steps to one environment step."""
    batch_size: int = 256
    lr: float = 1e-3
    """Learning rate of actor and critic (Adam)."""
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights that a target network takes over at each gradient step."""
    hidden: tuple[int, ...] = (400, 300)
    """Widths of the hidden layers, of the actor and of the critic."""
    learner_threads: int = 2
    """2: actor and critic compute their gradients side by side. The results are the same."""
    eval_episodes: int = 20
    eval_every: int = 10_000
    """Environment steps from one evaluation and checkpoint to the next."""
    log_every: int = 1_000
    """Environment steps from one line of metrics to the next."""
    worker_timeout_s: float = 120.0
    """A call that takes a worker longer ends the worker, and is repeated by a new one."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag = f"--{name.replace('_', '-')} is {value}"
            if name == "hidden":
                if min(value, default=1) < 1:
                    raise UserError(f"{flag}: widths must be positive")
            elif isinstance(value, int | float) and (value < 0 if name in MAY_BE_ZERO else value <= 0):
                raise UserError(f"{flag}: must {'not be negative' if name in MAY_BE_ZERO else 'be positive'}")
            if name in ("gamma", "tau") and value > 1:
                raise UserError(f"{flag}: must be at most 1")
        if self.learner_threads > 2:
            raise UserError(f"--learner-threads is {self.learner_threads}: must be 1 or 2")


MAY_BE_ZERO = {"noise_std", "learning_starts", "target_noise", "ou_theta"}


class Algorithm(Protocol):
    """What differs from agent to agent. Modules and optimizers are all of its state."""

    modules: dict[str, nn.Module]  # "actor" is the one that plays
    optimizers: dict[str, torch.optim.Optimizer]
    exploration: Exploration

    def update(self, batch: Transitions, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """One gradient step, the `step`-th of the run. Returns scalars to be logged."""
        ...


def train(config: ReplayConfig, run: "Run", algorithm: Algorithm) -> None:
    """Metrics are logged by environment steps; `eval/...` in summary.json are those of the last policy."""
    learner = Learner(config, run.seed, algorithm)
    files = ReplayFiles(run.directory / "replay")
    workers = start_workers(config, run, algorithm)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
        files.restore(learner.replay, state["replay"])
    pipeline = Pipeline(workers, "collect", config.worker_timeout_s, in_order=True)
    clock = Clock(learner)
    while learner.env_steps < config.steps:
        for worker in range(len(workers)):
            pipeline.issue(worker, *learner.next_call(len(pipeline), restart=True))
        metrics: dict[str, float] = {}
        next_evaluation = (learner.env_steps // config.eval_every + 1) * config.eval_every
        while pipeline:
            worker, experience = pipeline.next()
            before = learner.env_steps
            learner.add(experience)
            if learner.env_steps < min(next_evaluation, config.steps):
                pipeline.issue(worker, *learner.next_call(len(pipeline), restart=False))  # it plays while we learn
            metrics |= learner.learn()
            if pipeline and learner.env_steps // config.log_every > before // config.log_every:
                run.log(learner.env_steps, metrics | clock.rates(workers), config.steps)
        metrics |= evaluation(config, workers, learner) | clock.rates(workers)
        run.log(learner.env_steps, metrics, config.steps)
        state = learner.state() | {"replay": files.save(learner.replay)}
        run.save(learner.env_steps, state, score=metrics["eval/return_mean"])
        run.summarize({name: value for name, value in metrics.items() if name.startswith("eval/")})
        clock.restart()  # evaluating and saving are not counted


def evaluate(config: ReplayConfig, run: "Run", algorithm: Algorithm) -> None:
    """Play `eval_episodes` episodes of the policy of the run's checkpoint, without noise."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    learner = Learner(config, run.seed, algorithm)
    learner.load_state(state)
    metrics = evaluation(config, start_workers(config, run, algorithm), learner)
    run.log(learner.env_steps, metrics)
    run.summarize(metrics)


def start_workers(config: ReplayConfig, run: "Run", algorithm: Algorithm) -> "ActorGroup":
    return run.actors(
        ExperienceWorker,
        config.workers,
        {"cpu": 1},
        config.env,
        config.envs_per_worker,
        config.hidden,
        algorithm.exploration,
        config.gamma,
        run.seed,
        name="rollout",
    )


def evaluation(config: ReplayConfig, workers: "ActorGroup", learner: "Learner") -> dict[str, float]:
    shares = [len(share) for share in np.array_split(np.arange(config.eval_episodes), len(workers))]
    seed = derive_seed(learner.seed, "evaluation", learner.round)
    calls = [(learner.policy_weights(), episodes, seed) for episodes in shares]
    returns = np.concatenate(call_each(workers, "evaluate", calls, config.worker_timeout_s))
    return {"eval/return_mean": float(returns.mean()), "eval/return_std": float(returns.std())}


class Learner:
    """The algorithm's networks and optimizers, the replay buffer, and counters: all that a checkpoint has to hold."""

    def __init__(self, config: ReplayConfig, seed: int, algorithm: Algorithm) -> None:
        self.config, self.seed, self.algorithm = config, seed, algorithm
        spaces = box_spaces(config.env)
        self.replay = ReplayBuffer(config.buffer_size, spaces.observation_size, spaces.action_size)
        self.env_steps = 0
        self.gradient_steps = 0
        self.round = 0  # calls of the workers so far
        self.returns: deque[float] = deque(maxlen=100)  # of the latest episodes

    def policy_weights(self) -> np.ndarray:
        return parameters_to_vector(self.algorithm.modules["actor"].parameters()).detach().numpy()

    def next_call(self, under_way: int, restart: bool) -> tuple[np.ndarray | None, int, int, int, bool]:
        """The arguments of the next `ExperienceWorker.collect`, after `under_way` that have not yet returned."""
        config = self.config
        asked_for = self.env_steps + under_way * config.fragment_steps * config.envs_per_worker
        weights = None if asked_for < config.learning_starts else self.policy_weights()
        self.round += 1
        return weights, self.gradient_steps, config.fragment_steps, self.round, restart

    def add(self, experience: Experience) -> None:
        self.replay.add(experience.rows)
        self.env_steps += len(experience.rows)
        self.returns.extend(experience.episode_returns.tolist())
        self.lag = self.gradient_steps - experience.policy_version if experience.policy_version >= 0 else 0

    def learn(self) -> dict[str, float]:
        """The gradient steps that the environment steps so far allow. Raises UserError if a loss is not finite."""
        config = self.config
        due = int(config.gradient_steps * (self.env_steps - config.learning_starts)) - self.gradient_steps
        figures: dict[str, list[Tensor]] = {}
        if due > 0:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "learning", self.gradient_steps))
            for _ in range(due):
                batch = self.replay.sample(config.batch_size, generator)
                self.gradient_steps += 1
                for name, value in self.algorithm.update(batch, generator, self.gradient_steps).items():
                    figures.setdefault(name, []).append(value)
        metrics = {f"train/{name}": torch.stack(values).mean().item() for name, values in figures.items()}
        if not np.isfinite(list(metrics.values())).all():
            raise UserError(
                f"the loss is not finite at step {self.env_steps}: the last checkpoint is good; try a lower --lr"
            )
        metrics |= {"train/gradient_steps": self.gradient_steps, "train/policy_lag": self.lag}
        return ({"train/return_mean": float(np.mean(self.returns))} if self.returns else {}) | metrics

    def state(self) -> dict[str, Any]:
        return {
            "env": self.config.env,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "round": self.round,
            "returns": list(self.returns),
            "modules": {name: module.state_dict() for name, module in self.algorithm.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.algorithm.optimizers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of another environment or other network sizes."""
        if state["env"] != self.config.env:
            raise UserError(f"the checkpoint is of {state['env']}, not of {self.config.env}: give --env {state['env']}")
        try:
            for name, module in self.algorithm.modules.items():
                module.load_state_dict(state["modules"][name])
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's networks are not those of --hidden {self.config.hidden}: {error}"
            ) from error
        for name, optimizer in self.algorithm.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.env_steps, self.gradient_steps, self.round = (state[k] for k in ("env_steps", "gradient_steps", "round"))
        self.returns.extend(state["returns"])


class Clock:
    """Speeds since the last look."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.restart()

    def restart(self) -> None:
        self.at, self.env_steps = time.perf_counter(), self.learner.env_steps
        self.gradient_steps = self.learner.gradient_steps

    def rates(self, workers: "ActorGroup") -> dict[str, float]:
        seconds = time.perf_counter() - self.at
        rates = {
            "time/env_steps_per_s": (self.learner.env_steps - self.env_steps) / seconds,
            "time/gradient_steps_per_s": (self.learner.gradient_steps - self.gradient_steps) / seconds,
            "run/actor_restarts": float(workers.restarts),
        }
        self.restart()
        return rates
