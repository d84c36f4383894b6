"""The actor that plays: a vector environment, and a snapshot of the policy beside it.

One call collects a whole fragment, so the trip to the worker is paid once for hundreds of steps. The policy's forward
pass is numpy: on networks this small torch takes several times as long.

Shapes: T steps, N environments, D numbers an observation, A actions.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.control.vector_env import ControlSpaces, as_vectors, make_vector_env
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup

EVALUATION_ENVS = 64  # at most, in one vector environment
ATTEMPTS = 5  # at one call, each on a worker that was started anew


@dataclass(frozen=True)
class Fragment:
    """T steps of N environments. Where `valid` is false the step is an autoreset dummy and counts for nothing.

    observations[t+1] is what step t led to: at the end of an episode its final observation.
    """

    observations: np.ndarray  # (T+1, N, D) float32
    actions: np.ndarray  # (T, N) int64, counted from 0
    log_probs: np.ndarray  # (T, N) float32, of the actions when they were drawn
    rewards: np.ndarray  # (T, N) float32
    terminated: np.ndarray  # (T, N) bool
    truncated: np.ndarray  # (T, N) bool
    valid: np.ndarray  # (T, N) bool
    episode_returns: np.ndarray  # (E,) float32, of the episodes that ended, in order

    def steps(self, begin: int, end: int) -> "Fragment":
        """The steps [begin, end), without the episodes."""
        cut = {f.name: getattr(self, f.name)[begin:end] for f in fields(self)}
        cut["observations"] = self.observations[begin : end + 1]
        return Fragment(**cut | {"episode_returns": self.episode_returns[:0]})


def join(fragments: Sequence[Fragment]) -> Fragment:
    """Put the environments of several workers side by side."""
    joined = {f.name: np.concatenate([getattr(x, f.name) for x in fragments], 1) for f in fields(Fragment)[:-1]}
    return Fragment(**joined, episode_returns=np.concatenate([x.episode_returns for x in fragments]))


class NumpyMLP:
    """The forward pass of a tanh MLP, from the flat vector that `torch.nn.utils.parameters_to_vector` makes of one."""

    def __init__(self, sizes: Sequence[int], flat: np.ndarray) -> None:
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []
        offset = 0
        for fan_in, fan_out in itertools.pairwise(sizes):
            weight = flat[offset : offset + fan_in * fan_out].reshape(fan_out, fan_in).T
            offset += fan_in * fan_out
            self.layers.append((weight, flat[offset : offset + fan_out]))
            offset += fan_out
        if offset != len(flat):
            raise ValueError(f"{len(flat)} weights for layers of {list(sizes)}, which have {offset}")

    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        *hidden, (weight, bias) = self.layers
        for hidden_weight, hidden_bias in hidden:
            x_ND = np.tanh(x_ND @ hidden_weight + hidden_bias)
        return x_ND @ weight + bias


def sample(logits_NA: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an action of each softmax. Returns actions (N,) and their log-probabilities (N,)."""
    log_probs_NA = logits_NA - logits_NA.max(-1, keepdims=True)
    log_probs_NA -= np.log(np.exp(log_probs_NA).sum(-1, keepdims=True))
    gumbel_NA = -np.log(rng.standard_exponential(logits_NA.shape, dtype=np.float32))
    actions_N = (log_probs_NA + gumbel_NA).argmax(-1)
    return actions_N, np.take_along_axis(log_probs_NA, actions_N[:, None], -1)[:, 0]


class RolloutWorker:
    """Plays `num_envs` environments. Weights are the actor's, as one flat float32 vector."""

    def __init__(
        self, env_id: str, num_envs: int, spaces: ControlSpaces, hidden: Sequence[int], seed: int, actor_index: int = 0
    ) -> None:
        self.env_id, self.spaces, self.seed, self.index = env_id, spaces, seed, actor_index
        self.sizes = [spaces.observation_size, *hidden, spaces.actions]
        self.env = make_vector_env(env_id, num_envs)
        self.observations: np.ndarray | None = None  # None: episodes have yet to begin
        self.done = np.zeros(num_envs, bool)
        self.returns = np.zeros(num_envs, np.float32)

    def collect(self, weights: np.ndarray, steps: int, round: int, restart: bool) -> Fragment:
        """Play `steps` steps of each environment, going on where the last call stopped.

        restart: begin new episodes. All randomness comes from the run's seed, the worker's number and `round`, so
        that a call after a restart depends on nothing that came before it; a replaced worker restarts on its own.
        Raises UserError if the environment returns numbers that are not finite.
        """
        policy = NumpyMLP(self.sizes, weights)
        rng = np.random.default_rng(derive_seed(self.seed, "actions", self.index, round))
        if restart or self.observations is None:
            first, _ = self.env.reset(seed=derive_seed(self.seed, "episodes", self.index, round))
            self.observations = as_vectors(first, self.env_id)
            self.done[:] = False
            self.returns[:] = 0
        n = len(self.done)
        out = Fragment(
            observations=np.empty((steps + 1, n, self.spaces.observation_size), np.float32),
            actions=np.empty((steps, n), np.int64),
            log_probs=np.empty((steps, n), np.float32),
            rewards=np.empty((steps, n), np.float32),
            terminated=np.empty((steps, n), bool),
            truncated=np.empty((steps, n), bool),
            valid=np.empty((steps, n), bool),
            episode_returns=np.empty(0, np.float32),
        )
        finished: list[float] = []
        out.observations[0] = self.observations
        for t in range(steps):
            out.actions[t], out.log_probs[t] = sample(policy(out.observations[t]), rng)
            out.valid[t] = ~self.done
            step = self.env.step(out.actions[t] + self.spaces.first_action)
            out.observations[t + 1], out.rewards[t], out.terminated[t], out.truncated[t], _ = step
            self.done = out.terminated[t] | out.truncated[t]
            self.returns += out.rewards[t]
            if self.done.any():
                finished += self.returns[self.done].tolist()
                self.returns[self.done] = 0
        self.observations = out.observations[steps].copy()
        as_vectors(out.observations.reshape(-1, self.spaces.observation_size), self.env_id)
        if not np.isfinite(out.rewards).all():
            raise UserError(f"{self.env_id} paid a reward that is not finite")
        return replace(out, episode_returns=np.array(finished, np.float32))

    def evaluate(self, weights: np.ndarray, episodes: int, seed: int) -> np.ndarray:
        """Returns (episodes,) of the greedy policy, on environments of their own.

        Each environment plays a number of episodes that is fixed beforehand: the first `episodes` to end would be too
        many short ones.
        """
        if episodes == 0:
            return np.empty(0, np.float32)
        policy = NumpyMLP(self.sizes, weights)
        env = make_vector_env(self.env_id, n := min(episodes, EVALUATION_ENVS))
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        running, done, returns = np.zeros(n), np.zeros(n, bool), []
        observations, _ = env.reset(seed=derive_seed(seed, "evaluation", self.index))
        while left.any():
            actions = policy(as_vectors(observations, self.env_id)).argmax(-1) + self.spaces.first_action
            observations, rewards, terminated, truncated, _ = env.step(actions)
            running += rewards
            done = terminated | truncated
            returns += running[done & (left > 0)].tolist()
            left[done & (left > 0)] -= 1
            running[done] = 0
        env.close()
        return np.array(returns, np.float32)

    def close(self) -> None:
        self.env.close()


def call_each(workers: "ActorGroup", method: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float) -> list[Any]:
    """Call worker i with arguments[i], all at once; return the results in the workers' order.

    A call whose worker died is repeated on the worker that replaced it. Raises ConnectionError after ATTEMPTS deaths.
    """
    waiting: deque[tuple[int, int, Future[Any]]] = deque(
        (i, 1, workers.call(i, method, *arguments[i], timeout_s=timeout_s)) for i in range(len(workers))
    )
    results: list[Any] = [None] * len(workers)
    while waiting:
        i, attempt, future = waiting.popleft()
        try:
            results[i] = future.result()
        except ConnectionError:
            if attempt == ATTEMPTS:
                raise
            waiting.append((i, attempt + 1, workers.call(i, method, *arguments[i], timeout_s=timeout_s)))
    return results
