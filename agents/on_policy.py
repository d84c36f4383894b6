"""What the on-policy algorithms share: the loop, and the state that a checkpoint holds. Their files hold the rest.

    workers play ──fragment──▶ learner: normalise, `update` (the algorithm) ──snapshot──▶ workers play ...
                                        └─ now and then: evaluate, checkpoint, begin new episodes

Shapes: T steps, N environments of all workers, B valid steps among them, D numbers an observation.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from agents.adam import Adam
from agents.checkpoint import load_networks, networks_state, policy_state, refuse_infinite, refuse_other_policy
from agents.clock import Clock
from agents.config import ControlConfig
from agents.evaluation import catch_up, evaluate_and_save
from agents.moments import CLIP, Moments, Normalizer
from agents.pipeline import Pipeline
from agents.returns import gae
from agents.rollout import Fragment, RolloutConfig, RolloutWorker, Snapshot, join
from envs.control.spaces import ControlSpaces, DiscreteActions
from envs.control.vector_env import control_spaces
from models.control.policies import CategoricalPolicy, GaussianPolicy, Policy, StateDependentGaussianPolicy
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run


@dataclass(frozen=True)
class OnPolicyConfig(ControlConfig):
    n_steps: int = 8
    """Steps of each environment to one update."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """linear: learning rates fall to 0 over the run."""
    normalize_observations: bool = False
    """Subtract the running mean, divide by the running standard deviation."""
    normalize_rewards: bool = False
    """Divide by the running standard deviation of the discounted return."""
    log_std_init: float = 0.0
    """Of the Gaussian policy for continuous actions: logarithm of the first standard deviation."""
    sde_steps: int = 0
    """Continuous actions explore by generalised state-dependent noise (gSDE), drawn anew every so many steps and with
    each call of the workers; `log_std_init` is then that of the noise's weights. 0: independent noise at each step."""

    may_be_zero: ClassVar[frozenset[str]] = ControlConfig.may_be_zero | {"sde_steps"}
    any_number: ClassVar[frozenset[str]] = frozenset({"log_std_init"})
    of_the_policy: ClassVar[tuple[str, ...]] = ("activation", "normalize_observations", "sde_steps")

    @property
    def steps_per_call(self) -> int:
        """Steps of each environment to one call of the workers."""
        return self.n_steps


@dataclass(frozen=True)
class AdvantageConfig(OnPolicyConfig):
    """Of the algorithms whose advantages `batch` estimates."""

    gae_lambda: float = 0.95
    """1 is the n-step return, 0 one-step temporal differences."""

    may_be_zero: ClassVar[frozenset[str]] = OnPolicyConfig.may_be_zero | {"gae_lambda"}
    at_most_one: ClassVar[frozenset[str]] = OnPolicyConfig.at_most_one | {"gae_lambda"}


def train(config: OnPolicyConfig, run: "Run", learner: "Learner", overlap: bool = False) -> None:
    """Metrics are logged by environment steps; `eval/...` in summary.json are those of the last policy.

    overlap: the workers play the next fragment while the learner learns from this one, by the policy from before it.

    Each checkpoint ends the running episodes, so that what follows it depends on the checkpoint alone: a resumed run
    repeats an uninterrupted one bit for bit, with any number of workers that stay alive.
    """
    torch.set_num_threads(1)  # the networks are too small to be shared among threads
    workers = learner.start_workers(run)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
        catch_up(config, run, workers, learner, state, learner.state)
    pipeline = Pipeline(workers, "collect", config.worker_timeout_s, ahead=0)
    clock = Clock(learner, workers, "env_steps")

    def play(round: int, restart: bool) -> None:
        snapshot = learner.snapshot()
        for worker in range(len(workers)):
            pipeline.issue(worker, snapshot, config.steps_per_call, round, restart)

    restart = True
    while learner.env_steps < config.steps:
        with clock.waiting():
            if not pipeline:
                play(learner.round, restart)
            fragment = join([pipeline.next()[1] for _ in range(len(workers))])
            before, after = learner.env_steps, learner.env_steps + int(fragment.valid.sum())
            restart = after >= config.steps or after // config.eval_every > before // config.eval_every
            if overlap and not restart:  # no call is under way at a checkpoint
                play(learner.round + 1, restart)
        metrics = learner.learn(fragment)
        if restart or after // config.log_every > before // config.log_every:
            metrics |= clock.rates()
            if restart:
                evaluate_and_save(config, run, workers, learner, metrics, learner.state)
            else:
                run.log(learner.env_steps, metrics, config.steps)
            clock.restart()


class Learner(ABC):
    """Networks, optimizers, normalisers and counters: all that a checkpoint has to hold.

    An algorithm makes its `networks` (under "policy" the one that plays) and `optimizers`, and defines `update`.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def __init__(self, config: OnPolicyConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.spaces = control_spaces(config.env)
        self.env_steps = 0
        self.round = 0  # calls of the workers so far
        self.returns: deque[float] = deque(maxlen=100)  # of the latest episodes
        self.observation_moments = Moments.none(self.spaces.observation_size)
        self.return_moments = Moments.none(1)

    @abstractmethod
    def update(self, fragment: Fragment) -> dict[str, float]:
        """Learn from a normalised fragment. Returns metrics under `train/`."""

    @property
    def policy(self) -> Policy:
        policy = self.networks["policy"]
        assert isinstance(policy, Policy)
        return policy

    def start_workers(self, run: "Run") -> "ActorGroup":
        """Raises UserError if the run is to use a GPU."""
        if run.device != "cpu":
            raise UserError(
                f"--device {run.device}: this agent learns on the CPU, leave it out; ddpg, td3 and sac take a GPU"
            )
        env, envs, policy = self.config.env, self.config.envs_per_worker, self.policy.numpy_policy
        rollout = RolloutConfig(env, envs, policy, run.seed, self.config.gamma, self.config.step_timeout_s)
        return run.actors(RolloutWorker, self.config.workers, {"cpu": 1}, rollout, name="rollout")

    def normalizer(self) -> Normalizer | None:
        return Normalizer.from_moments(self.observation_moments) if self.config.normalize_observations else None

    def snapshot(self) -> Snapshot:
        return Snapshot(self.round, self.policy.flat_weights(), self.normalizer())

    def learn(self, fragment: Fragment) -> dict[str, float]:
        """Raises UserError if what `update` returns, or a weight after it, is not finite."""
        self.returns.extend(fragment.episode_returns.tolist())
        self.return_moments = self.return_moments.merged(fragment.return_moments)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rate(group["initial_lr"])
        metrics = self.update(self.normalized(fragment)) if fragment.valid.any() else {}
        if self.config.normalize_observations:  # afterwards: learnt from is what the policy saw that played
            self.observation_moments = self.observation_moments.merged(fragment.observation_moments)
        self.env_steps += int(fragment.valid.sum())
        self.round += 1
        refuse_infinite(metrics, self.networks, self.env_steps)
        return ({"train/return_mean": float(np.mean(self.returns))} if self.returns else {}) | metrics

    def normalized(self, fragment: Fragment) -> Fragment:
        """By the statistics of now, as far as the configuration asks for it."""
        if (normalizer := self.normalizer()) is not None:
            fragment = replace(fragment, observations=normalizer(fragment.observations))
        if self.config.normalize_rewards:
            scaled = fragment.rewards / self.return_moments.std().astype(np.float32)
            fragment = replace(fragment, rewards=np.clip(scaled, -CLIP, CLIP))
        return fragment

    def rate(self, initial: float) -> float:
        """A learning rate by the schedule."""
        return initial * self.remaining if self.config.lr_schedule == "linear" else initial

    @property
    def remaining(self) -> float:
        """Share of the run that lies ahead."""
        return max(0.0, 1 - self.env_steps / self.config.steps)

    def state(self) -> dict[str, Any]:
        return {
            **policy_state(self.config),
            "env_steps": self.env_steps,
            "round": self.round,
            "returns": list(self.returns),
            "observation_moments": self.observation_moments.state(),
            "return_moments": self.return_moments.state(),
            **networks_state(self.networks, self.optimizers),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of another environment, policy or other networks."""
        refuse_other_policy(state, self.config)
        load_networks(state, self.networks, self.optimizers, self.config.hidden)
        self.observation_moments = Moments.from_state(state["observation_moments"])
        self.return_moments = Moments.from_state(state["return_moments"])
        self.env_steps, self.round = state["env_steps"], state["round"]
        self.returns.extend(state["returns"])


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Within, torch draws the weights of the run's networks, and goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights"))
        yield


def make_policy(config: OnPolicyConfig, spaces: ControlSpaces) -> Policy:
    sizes = config.hidden, config.activation
    if isinstance(spaces.actions, DiscreteActions):
        if config.sde_steps:
            raise UserError(
                f"--sde-steps {config.sde_steps} is for continuous actions, and those of {config.env} are discrete: "
                "leave it out"
            )
        return CategoricalPolicy(spaces.observation_size, spaces.actions.count, *sizes)
    if config.sde_steps:
        noise = config.log_std_init, config.sde_steps
        return StateDependentGaussianPolicy(spaces.observation_size, spaces.actions.size, *sizes, *noise)
    return GaussianPolicy(spaces.observation_size, spaces.actions.size, *sizes, config.log_std_init)


@dataclass(frozen=True)
class Batch:
    """The valid steps of a fragment."""

    observations: Tensor  # (B, D)
    actions: Tensor  # (B,) or (B, A)
    log_probs: Tensor  # (B,), when they were drawn
    advantages: Tensor  # (B,), mean 0 and standard deviation 1 unless `batch` was told to leave them, or B is 1
    targets: Tensor  # (B,), of the critic: the λ-returns


def batch(fragment: Fragment, values_TN: np.ndarray, config: AdvantageConfig, normalize: bool = True) -> Batch:
    """values_TN: (T+1, N), the critic's of all the fragment's observations."""
    flags = fragment.terminated, fragment.truncated
    advantages = gae(fragment.rewards, values_TN, *flags, config.gamma, config.gae_lambda)
    targets = advantages + values_TN[:-1]
    valid = fragment.valid
    counted = advantages[valid]
    if normalize and len(counted) > 1:  # a single one would become 0, and its step nothing
        counted = (counted - counted.mean()) / (counted.std() + 1e-8)
    arrays = (fragment.observations[:-1][valid], fragment.actions[valid], fragment.log_probs[valid])
    return Batch(*(torch.from_numpy(array) for array in (*arrays, counted, targets[valid])))


def fit_critic(
    critic: nn.Module, optimizer: Optimizer, steps: Batch, epochs: int, batch_size: int, generator: torch.Generator
) -> float:
    """Regress the critic on its targets by minibatches. Returns the mean squared error of the last epoch."""
    total = len(steps.targets)
    for _ in range(epochs):
        order = torch.randperm(total, generator=generator)
        squared = 0.0
        for chosen in order.split(batch_size):
            loss = (critic(steps.observations[chosen]) - steps.targets[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            squared += loss.item() * len(chosen)
    return squared / total


def explained_variance(targets: Tensor, predictions: Tensor) -> float:
    """1: the critic knows the returns; 0: no better than their mean."""
    unexplained = (targets - predictions).var(correction=0) / (targets.var(correction=0) + 1e-8)
    return 1 - unexplained.item()


def adam(*networks_and_rates: tuple[nn.Module, float]) -> Optimizer:
    """Networks that learn together, each at a rate of its own, which follows the run's schedule."""
    groups = [{"params": list(net.parameters()), "lr": lr, "initial_lr": lr} for net, lr in networks_and_rates]
    return Adam(groups, eps=1e-5, fused=True)


def descend(optimizer: Optimizer, loss: Tensor, max_grad_norm: float) -> None:
    """One step along the gradient of `loss`, of which each network's part is clipped to a norm."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
