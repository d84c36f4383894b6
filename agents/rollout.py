"""The actor that plays: a vector environment, and a snapshot of the policy beside it.

One call collects a whole fragment, so the trip to the worker is paid once for hundreds of steps. The policy's forward
pass is numpy: on networks this small torch takes several times as long.

Shapes: T steps, N environments, D numbers an observation, A numbers an action, K numbers the policy's network gives.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import numpy as np

from agents.moments import Moments, Normalizer
from agents.noise import OrnsteinUhlenbeck
from agents.step_limit import StepLimit
from envs.control.spaces import BoxActions
from envs.control.vector_env import ControlEnv
from models.control.numpy_policies import NumpyPolicy
from models.seeding import derive_seed

EVALUATION_ENVS = 64  # at most, in one vector environment
NOISE_STEPS = 64  # for which an evaluation draws noise at once


@dataclass(frozen=True)
class Snapshot:
    """A policy as it travels to the workers."""

    version: int  # counts the learner's updates
    weights: np.ndarray  # flat float32
    normalizer: Normalizer | None = None  # of observations


@dataclass(frozen=True)
class Fragment:
    """T steps of N environments. Where `valid` is false the step is an autoreset dummy and counts for nothing.

    observations[t+1] is what step t led to: at the end of an episode its final observation. Observations and rewards
    are the environment's, before any normalisation.
    """

    observations: np.ndarray  # (T+1, N, D) float32
    actions: np.ndarray  # (T, N) int64, counted from 0, or (T, N, A) float32, before they are clipped to the bounds
    log_probs: np.ndarray  # (T, N) float32, of the actions when they were drawn
    rewards: np.ndarray  # (T, N) float32
    terminated: np.ndarray  # (T, N) bool
    truncated: np.ndarray  # (T, N) bool
    valid: np.ndarray  # (T, N) bool
    versions: np.ndarray  # (N,) int64, of the snapshot that played
    episode_returns: np.ndarray  # (E,) float32, of the episodes that ended, in order
    observation_moments: Moments  # of the valid observations; empty if the policy has no normaliser
    return_moments: Moments  # of the discounted sum of rewards so far, at each valid step

    def steps(self, begin: int, end: int) -> "Fragment":
        """The steps [begin, end), with nothing of what belongs to the whole fragment."""
        cut: dict[str, Any] = {name: getattr(self, name)[begin:end] for name in STEPWISE}
        cut |= {"observations": self.observations[begin : end + 1], "episode_returns": self.episode_returns[:0]}
        return replace(self, **cut, observation_moments=Moments.none(0), return_moments=Moments.none(1))


STEPWISE = [f.name for f in fields(Fragment)[:7]]  # have a dimension N at place 1


def join(fragments: Sequence[Fragment]) -> Fragment:
    """Put the environments of several workers side by side."""
    first, *others = fragments
    if not others:
        return first
    joined: dict[str, Any] = {f: np.concatenate([getattr(x, f) for x in fragments], 1) for f in STEPWISE}
    for name in ("versions", "episode_returns"):
        joined[name] = np.concatenate([getattr(x, name) for x in fragments])
    for name in ("observation_moments", "return_moments"):
        joined[name] = reduce(Moments.merged, [getattr(x, name) for x in fragments])
    return Fragment(**joined)


@dataclass(frozen=True)
class RolloutConfig:
    """What a worker plays, and how.

    policy: makes the numpy policy of a snapshot's flat weights. noise: what the policy's noise goes through, from step
    to step of an episode; None leaves it independent. n_step: how far a transition for the replay buffer reaches.
    """

    env: str
    num_envs: int
    policy: Callable[[np.ndarray], NumpyPolicy]
    seed: int
    gamma: float  # of `return_moments`, and of transitions for the replay buffer
    step_timeout_s: float
    noise: OrnsteinUhlenbeck | None = None
    n_step: int = 1


class RolloutWorker:
    """Plays `num_envs` environments."""

    def __init__(self, config: RolloutConfig, actor_index: int = 0) -> None:
        self.config, self.index = config, actor_index
        self.env = ControlEnv(config.env, config.num_envs)
        self.observations: np.ndarray | None = None  # None: episodes have yet to begin
        self.done = np.zeros(config.num_envs, bool)
        self.returns = np.zeros(config.num_envs, np.float32)
        self.discounted = np.zeros(config.num_envs, np.float32)
        self.under_way: Iterator[Any] | None = None  # an evaluation or a film, from one call to the next

    def collect(self, snapshot: Snapshot, steps: int, round: int, restart: bool) -> Fragment:
        """Play `steps` steps of each environment, going on where the last call stopped.

        restart: begin new episodes. All randomness comes from the run's seed, the worker's number and `round`, so
        that a call after a restart depends on nothing that came before it; a replaced worker restarts on its own.
        Raises UserError if the environment fails, takes longer over a step than `step_timeout_s`, or returns numbers
        that are not finite or not in its space.
        """
        policy, normalizer = self.config.policy(snapshot.weights), snapshot.normalizer
        rng = np.random.default_rng(self._seed("actions", round))
        to_env = env_actions(self.env, policy)
        with StepLimit(self.config.env, self.config.step_timeout_s) as limit:
            if restart or self.observations is None:
                self.observations = self.env.reset(self._seed("episodes", round))
                self.done[:] = False
                self.returns[:] = 0
                self.discounted[:] = 0
            n = len(self.done)
            observations = np.empty((steps + 1, n, self.env.spaces.observation_size), np.float32)
            rewards = np.empty((steps, n), np.float32)
            terminated, truncated, valid = (np.empty((steps, n), bool) for _ in range(3))
            outputs, actions = [], []
            finished: list[float] = []
            observations[0] = self.observations
            x = self.observations if normalizer is None else normalizer(self.observations)
            noise: np.ndarray | None = None
            for t in range(steps):
                outputs.append(policy(x))
                if noise is None:
                    noise = policy.noise(rng, (steps, *outputs[0].shape))
                actions.append(policy.act(outputs[t], noise[t]))
                np.logical_not(self.done, out=valid[t])
                limit.begin()
                step = self.env.step(to_env(actions[t]))
                observations[t + 1], rewards[t], terminated[t], truncated[t] = step
                x = observations[t + 1] if normalizer is None else normalizer(observations[t + 1])
                self.done = terminated[t] | truncated[t]
                self.returns += rewards[t]
                if self.done.any():
                    finished += self.returns[self.done].tolist()
                    self.returns[self.done] = 0
        self.env.check(observations, rewards)
        self.observations = observations[steps].copy()
        played = np.stack(actions)
        return Fragment(
            observations=observations,
            actions=played,
            log_probs=policy.log_probs(np.stack(outputs), played),
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
            valid=valid,
            versions=np.full(n, snapshot.version),
            episode_returns=np.array(finished, np.float32),
            observation_moments=Moments.of(observations[:-1][valid] if normalizer else observations[:0, 0]),
            return_moments=self._count_returns(rewards, terminated | truncated, valid),
        )

    def _count_returns(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> Moments:
        """R ← γR + r over each episode, whose spread is the scale of what the critic has to learn."""
        sums = np.empty_like(rewards)
        for t in range(len(rewards)):
            self.discounted *= self.config.gamma
            self.discounted += rewards[t]
            sums[t] = self.discounted
            self.discounted[done[t]] = 0
        return Moments.of(sums[valid][:, None])

    def evaluate(
        self, snapshot: Snapshot, episodes: int, seed: int, greedy: bool, slice_s: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns and lengths (episodes,) of the policy, greedy or sampled, on environments of their own.

        Each environment plays a number of episodes that is fixed beforehand: the first `episodes` to end would be too
        many short ones. The normaliser is that of the snapshot throughout.

        After `slice_s` seconds it returns None, and the same call again goes on: a time limit on a call then asks
        whether the worker lives, and not how long its episodes are. The results do not depend on it.
        """
        return self._go_on(self._evaluation(snapshot, episodes, seed, greedy, slice_s))

    def _evaluation(
        self, snapshot: Snapshot, episodes: int, seed: int, greedy: bool, slice_s: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray] | None]:
        if episodes == 0:
            yield np.empty(0, np.float32), np.empty(0, np.int64)
            return
        env = ControlEnv(self.config.env, n := min(episodes, EVALUATION_ENVS))
        try:
            left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
            seed = derive_seed(seed, "evaluation", self.index)
            played = yield from play(env, self.config, snapshot, left, seed, greedy, slice_s)
        finally:
            env.close()
        yield np.array([r for r, _ in played], np.float32), np.array([length for _, length in played])

    def film(self, snapshot: Snapshot, seed: int, slice_s: float) -> bytes | None:
        """One greedy episode as an animated GIF. None after `slice_s` seconds, as `evaluate`."""
        from agents.video import film_episode

        return self._go_on(film_episode(self.config, snapshot, seed, slice_s))

    def _go_on(self, afresh: Iterator[Any]) -> Any:
        """With what is under way, or else `afresh`. Whatever that raises ends it."""
        going, self.under_way = self.under_way or afresh, None
        found = next(going)
        if found is None:
            self.under_way = going
        return found

    def _seed(self, purpose: str, round: int) -> int:
        return derive_seed(self.config.seed, purpose, self.index, round)

    def close(self) -> None:
        self.env.close()


def play(
    env: ControlEnv,
    config: RolloutConfig,
    snapshot: Snapshot,
    episodes: np.ndarray,
    seed: int,
    greedy: bool,
    slice_s: float,
) -> Generator[None, None, list[tuple[float, int]]]:
    """Play episodes[i] episodes of environment i. Returns (return, length) of each, in the order they ended, and stops
    on the way whenever it has played for `slice_s` seconds."""
    policy, normalizer = config.policy(snapshot.weights), snapshot.normalizer
    to_env, rng = env_actions(env, policy), np.random.default_rng(seed)
    left, played = episodes.copy(), []
    running, length = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
    done = np.zeros(env.num_envs, bool)
    pushed = np.zeros((env.num_envs, 1), np.float32)  # the state of config.noise; (N, A) from its first step on
    limit, t = StepLimit(config.env, config.step_timeout_s), 0
    with limit:
        observations = env.reset(seed)
    while left.any():
        until = time.monotonic() + slice_s
        with limit:
            while left.any():
                outputs = policy(observations if normalizer is None else normalizer(observations))
                if greedy:
                    actions = policy.greedy(outputs)
                else:
                    if t % NOISE_STEPS == 0:
                        drawn = policy.noise(rng, (NOISE_STEPS, *outputs.shape))
                    noise = drawn[t % NOISE_STEPS]
                    if config.noise is not None:
                        noise = pushed = config.noise.step(pushed, noise)
                    actions = policy.act(outputs, noise)
                t += 1
                length += ~done
                limit.begin()
                observations, rewards, terminated, truncated = env.step(to_env(actions))
                env.check(observations, rewards)
                running += rewards
                done = terminated | truncated
                if done.any():
                    counted = done & (left > 0)
                    played += list(zip(running[counted].tolist(), length[counted].tolist()))
                    left -= counted
                    running[done], length[done] = 0, 0
                    pushed[done] = 0  # noise, too, begins anew with each episode
                if time.monotonic() > until:
                    break
        if left.any():
            yield  # with no alarm set: who knows when it goes on
    return played


def env_actions(env: ControlEnv, policy: NumpyPolicy) -> Callable[[np.ndarray], np.ndarray]:
    """What turns the policy's actions into the environment's."""
    space = env.spaces.actions
    if policy.unit_actions:
        assert isinstance(space, BoxActions)
        return lambda actions: space.to_env(space.from_unit(actions))
    return space.to_env
