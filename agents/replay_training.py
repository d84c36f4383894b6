"""What DDPG, TD3 and SAC share: a loop that collects while it learns, and the state that a checkpoint holds.

    workers   play fragment k+1 with the weights before update k ──┐       (nobody waits unless the other is slower)
    learner   fragment k ──▶ replay ──▶ gradient steps on random batches ──▶ weights after update k ──▶ fragment k+2

Fragments are taken in the order in which they were asked for, so a run depends on its seed alone, with any number of
workers. Before each evaluation the calls under way are used up, and after it new episodes begin: a checkpoint then has
no environments and no noise in it, and a resumed run repeats an uninterrupted one bit for bit.

Shapes: B transitions, A numbers an action, S gradient steps, K numbers of noise.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agents.adam import Adam
from agents.checkpoint import load_networks, networks_state, policy_state, refuse_infinite, refuse_other_policy
from agents.clock import Clock
from agents.config import ControlConfig
from agents.evaluation import catch_up, evaluate_and_save
from agents.experience import Experience, ExperienceWorker
from agents.graphed_step import GraphedStep
from agents.noise import OrnsteinUhlenbeck
from agents.pipeline import Pipeline
from agents.replay import ReplayBuffer, ReplayFiles, Transitions
from agents.rollout import RolloutConfig, Snapshot
from agents.side_by_side import SideBySide
from envs.control.spaces import BoxActions
from envs.control.vector_env import control_spaces
from models.control.numpy_policies import Activation
from models.control.q_networks import DeterministicActor, SquashedGaussian
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run


@dataclass(frozen=True)
class ReplayConfig(ControlConfig):
    env: str = "Pendulum-v1"
    steps: int = 20_000
    """Environment steps, over all workers."""
    workers: int = 1
    envs_per_worker: int = 1
    hidden: tuple[int, ...] = (400, 300)
    """Widths of the hidden layers, of each network."""
    activation: Activation = "relu"
    critic_layer_norm: bool = False
    """Layer normalisation in the hidden layers of the Q functions."""
    fragment_steps: int = 32
    """Steps of each environment to one call of a worker."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer holds."""
    learning_starts: int = 10_000
    """Environment steps with uniformly random actions before the first gradient step."""
    updates_per_step: float = 1.0
    """Gradient steps to one environment step."""
    n_step: int = 1
    """Rewards in the target of a Q function before the target network takes over."""
    batch_size: int = 256
    lr: float = 1e-3
    """Learning rate of all networks (Adam)."""
    lr_schedule: Literal["linear", "constant"] = "constant"
    """linear: it falls to 0 over the run."""
    tau: float = 0.005
    """How far a target network moves towards its network at each of its steps."""
    learner_threads: Literal[1, 2] = 2
    """2: on a CPU, actor and critic compute side by side. The results are the same."""
    matmul_precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: what the learner multiplies is rounded first, sums stay float32. Sooner on a CPU with AMX, and refused
    on any other."""
    eval_episodes: int = 20
    eval_every: int = 10_000
    log_every: int = 1_000

    may_be_zero: ClassVar[frozenset[str]] = ControlConfig.may_be_zero | {"learning_starts", "noise_std", "target_noise"}
    at_most_one: ClassVar[frozenset[str]] = ControlConfig.at_most_one | {"tau"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_starts >= self.steps:
            raise UserError(
                f"--learning-starts is {self.learning_starts}: with --steps {self.steps} nothing would be learnt; "
                "begin earlier or play longer"
            )
        if self.n_step > self.fragment_steps:
            raise UserError(
                f"--n-step is {self.n_step}: must not exceed --fragment-steps {self.fragment_steps}; play longer ones"
            )


def train(config: ReplayConfig, run: "Run", learner: "Learner") -> None:
    """Metrics are logged by environment steps; `eval/...` in summary.json are those of the last policy."""
    files = ReplayFiles(run.directory / "replay")
    workers = learner.start_workers(run)

    def everything() -> dict[str, Any]:
        return learner.state() | {"replay": files.save(learner.replay)}

    state = run.restore()
    if state is not None:
        learner.load_state(state)
        files.restore(learner.replay, state["replay"])
        catch_up(config, run, workers, learner, state, everything)
    pipeline = Pipeline(workers, "experience", config.worker_timeout_s, ahead=0)
    clock = Clock(learner, workers, "env_steps", "gradient_steps")
    while learner.env_steps < config.steps:
        next_evaluation = min(config.steps, (learner.env_steps // config.eval_every + 1) * config.eval_every)
        with clock.waiting():
            for worker in range(len(workers)):
                pipeline.issue(worker, *learner.next_call(len(pipeline), restart=True))
        metrics: dict[str, float] = {}
        while pipeline:
            with clock.waiting():
                worker, experience = pipeline.next()
            before = learner.env_steps
            learner.add(experience)
            if learner.env_steps < next_evaluation:
                with clock.waiting():
                    pipeline.issue(worker, *learner.next_call(len(pipeline), restart=False))  # it plays while we learn
            metrics |= learner.learn()
            if pipeline and learner.env_steps // config.log_every > before // config.log_every:
                run.log(learner.env_steps, metrics | clock.rates(), config.steps)
                clock.restart()
        evaluate_and_save(config, run, workers, learner, metrics | clock.rates(), everything)
        clock.restart()


class Learner(ABC):
    """Networks, optimizers, replay buffer and counters: all that a checkpoint has to hold.

    An algorithm makes the `actor`, which plays, all its `networks` and `optimizers`, and defines `update`. The networks
    and the buffer lie on `device`, where a GPU takes the steps by CUDA graphs; the actor plays on the CPU.
    Raises UserError for an environment whose actions are not continuous and bounded.
    """

    actor: DeterministicActor | SquashedGaussian
    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    noise: OrnsteinUhlenbeck | None = None
    drawn: ClassVar[int] = 0  # numbers from the normal distribution that `update` takes for each number of the actions

    def __init__(self, config: ReplayConfig, seed: int, device: str = "cpu") -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        spaces = control_spaces(config.env)
        self.observation_size, self.action_size = spaces.observation_size, bounded_actions(spaces.actions, config.env)
        self.replay = ReplayBuffer(config.buffer_size, self.observation_size, self.action_size, device)
        self.on_gpu = self.device.type == "cuda"
        self.side_by_side = SideBySide(1 if self.on_gpu else config.learner_threads)
        self.rate: Tensor | float = torch.tensor(config.lr, device=device) if self.on_gpu else config.lr
        self._graphs: dict[int, GraphedStep] = {}  # one for each phase
        set_matmul_precision(config.matmul_precision)
        self.env_steps = 0
        self.gradient_steps = 0
        self.round = 0  # calls of the workers so far
        self.lag = 0  # gradient steps between the weights that played the latest fragment and those that learn from it
        self.returns: deque[float] = deque(maxlen=100)  # of the latest episodes

    @abstractmethod
    def update(self, batch: Transitions, noise_KBA: Tensor) -> dict[str, Tensor]:
        """Gradient step number `gradient_steps`. Returns scalars, logged under `train/`. noise: standard normal."""

    def start_workers(self, run: "Run") -> "ActorGroup":
        env, envs, policy = self.config.env, self.config.envs_per_worker, self.actor.numpy_policy
        gamma, limit = self.config.gamma, self.config.step_timeout_s
        rollout = RolloutConfig(env, envs, policy, run.seed, gamma, limit, self.noise, self.config.n_step)
        return run.actors(ExperienceWorker, self.config.workers, {"cpu": 1}, rollout, name="rollout")

    def phase(self) -> int:
        """Steps with the same number do the same, each with its own batch and noise."""
        return 0

    def adam(self, network: nn.Module) -> Optimizer:
        """What a graph replays has its learning rate in a tensor, and counts its steps in one."""
        return Adam(network.parameters(), lr=self.rate, fused=True, capturable=self.on_gpu)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.gradient_steps, self.actor.flat_weights())

    def next_call(self, under_way: int, restart: bool) -> tuple[Snapshot | None, int, int, bool]:
        """Arguments for `ExperienceWorker.experience`, behind `under_way` calls that have not returned yet."""
        config = self.config
        asked_for = self.env_steps + under_way * config.fragment_steps * config.envs_per_worker
        snapshot = None if asked_for < config.learning_starts else self.snapshot()
        self.round += 1
        return snapshot, config.fragment_steps, self.round, restart

    def add(self, experience: Experience) -> None:
        self.replay.add(experience.rows)
        self.env_steps += experience.steps
        self.returns.extend(experience.episode_returns.tolist())
        played_by = experience.policy_version
        self.lag = 0 if played_by is None else self.gradient_steps - played_by

    def learn(self) -> dict[str, float]:
        """The gradient steps that the environment steps so far allow. Raises UserError if a loss or a weight is not
        finite."""
        config = self.config
        due = int(config.updates_per_step * (self.env_steps - config.learning_starts)) - self.gradient_steps
        remaining = max(0.0, 1 - self.env_steps / config.steps) if config.lr_schedule == "linear" else 1
        self._set_rate(config.lr * remaining)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "learning", self.gradient_steps))
        figures: dict[str, list[Tensor]] = {}
        if due > 0:
            positions_SB = self.replay.draw(due, config.batch_size, generator)
            noise_SKBA = torch.randn(due, self.drawn, config.batch_size, self.action_size, generator=generator)
            for positions_B, noise_KBA in zip(positions_SB, noise_SKBA.to(self.device)):
                self.gradient_steps += 1
                for name, value in self._step(positions_B, noise_KBA).items():
                    figures.setdefault(name, []).append(value)
        metrics = {f"train/{name}": torch.stack(values).mean().item() for name, values in figures.items()}
        refuse_infinite(metrics, self.networks, self.env_steps)
        metrics |= {"train/gradient_steps": self.gradient_steps, "train/policy_lag": self.lag}
        return metrics | ({"train/return_mean": float(np.mean(self.returns))} if self.returns else {})

    def _step(self, positions_B: Tensor, noise_KBA: Tensor) -> dict[str, Tensor]:
        if not self.on_gpu:
            return self._take_step(positions_B, noise_KBA)
        if self.phase() not in self._graphs:
            self._graphs[self.phase()] = GraphedStep(self._take_step)
        return self._graphs[self.phase()](positions_B, noise_KBA)

    def _take_step(self, positions_B: Tensor, noise_KBA: Tensor) -> dict[str, Tensor]:
        return self.update(self.replay.take(positions_B), noise_KBA)

    def _set_rate(self, rate: float) -> None:
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            self.rate = rate
        for optimizer in self.optimizers.values():  # a checkpoint may have brought others
            optimizer.param_groups[0].update(lr=self.rate, capturable=self.on_gpu)

    def state(self) -> dict[str, Any]:
        return {
            **policy_state(self.config),
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "round": self.round,
            "returns": list(self.returns),
            **networks_state(self.networks, self.optimizers),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Everything but the replay buffer. Raises UserError for a checkpoint of another environment, policy or
        network."""
        refuse_other_policy(state, self.config)
        load_networks(state, self.networks, self.optimizers, self.config.hidden)
        self.env_steps, self.gradient_steps, self.round = (state[k] for k in ("env_steps", "gradient_steps", "round"))
        self.returns.extend(state["returns"])


def set_matmul_precision(precision: Literal["float32", "bfloat16"]) -> None:
    """Of this process. Raises UserError for bfloat16 on a CPU that would be slower with it."""
    if precision == "bfloat16" and not torch.cpu._is_amx_tile_supported():
        raise UserError("--matmul-precision bfloat16: this CPU has no AMX and would be slower; choose float32")
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")


def bounded_actions(space: Any, env_id: str) -> int:
    """Numbers an action. Raises UserError unless actions are continuous and between finite bounds."""
    if not isinstance(space, BoxActions):
        raise UserError(f"{env_id} has discrete actions, and this agent needs continuous ones: try a2c, ppo or offpac")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(f"{env_id} has actions without bounds, and this agent's lie between two: wrap the environment")
    return space.size
