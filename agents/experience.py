"""The worker of the agents that learn from a replay buffer: plays, and returns rows that are ready for it.

Shapes: T steps, N environments, K transitions, W numbers a row (agents/replay.py), D an observation, A an action.
"""

from dataclasses import dataclass

import numpy as np

from agents.n_step import NStep
from agents.rollout import RolloutConfig, RolloutWorker, Snapshot
from agents.step_limit import StepLimit
from envs.control.spaces import BoxActions


@dataclass(frozen=True)
class Experience:
    """Transitions in the order in which they were played, without autoreset dummies."""

    rows: np.ndarray  # (K, W) float32
    steps: int  # that were played; rows are fewer where a transition reaches over several
    episode_returns: np.ndarray  # (E,) float32, of the episodes that ended, in order
    policy_version: int | None  # of the snapshot that played; None for uniformly random actions


class ExperienceWorker(RolloutWorker):
    def __init__(self, config: RolloutConfig, actor_index: int = 0) -> None:
        super().__init__(config, actor_index)
        space = self.env.spaces.actions
        assert isinstance(space, BoxActions)
        self.space = space
        self.noise_NA = np.zeros((config.num_envs, space.size), np.float32)
        self.n_step = NStep(config.n_step, config.gamma, self.env.spaces.observation_size + space.size)

    def experience(self, snapshot: Snapshot | None, steps: int, round: int, restart: bool) -> Experience:
        """Play `steps` steps of each environment, going on where the last call stopped.

        snapshot: None for actions that are uniformly random. Restarts, randomness and errors are as in `collect`.
        """
        rng = np.random.default_rng(self._seed("actions", round))
        policy, process = None if snapshot is None else self.config.policy(snapshot.weights), self.config.noise
        n, d, a = len(self.done), self.env.spaces.observation_size, self.space.size
        rows = np.empty((steps, n, 2 * d + a + 2), np.float32)
        valid, done = np.empty((2, steps, n), bool)
        finished: list[float] = []
        random = rng.uniform(-1, 1, (steps, n, a)) if policy is None else rng.standard_normal((steps, n, a))
        random = random.astype(np.float32)
        with StepLimit(self.config.env, self.config.step_timeout_s) as limit:
            if restart or self.observations is None:
                self.observations = self.env.reset(self._seed("episodes", round))
                self.done[:] = False
                self.returns[:] = 0
                self.noise_NA[:] = 0
                self.n_step.restart()
            for t in range(steps):
                if policy is None:
                    actions = random[t]
                else:
                    self.noise_NA = random[t] if process is None else process.step(self.noise_NA, random[t])
                    actions = policy.act(policy(self.observations), self.noise_NA)
                valid[t] = ~self.done
                rows[t, :, :d] = self.observations  # before the step: they may be the environment's own memory
                rows[t, :, d : d + a] = actions
                limit.begin()
                observations, rewards, terminated, truncated = self.env.step(
                    self.space.to_env(self.space.from_unit(actions))
                )
                rows[t, :, d + a] = rewards
                rows[t, :, d + a + 1] = self.config.gamma * ~terminated
                rows[t, :, d + a + 2 :] = observations
                self.observations = rows[t, :, d + a + 2 :]
                done[t] = self.done = terminated | truncated
                self.returns += rewards
                if self.done.any():
                    finished += self.returns[self.done].tolist()
                    self.returns[self.done] = 0
                    self.noise_NA[self.done] = 0
        self.env.check(rows[..., d + a + 2 :], rows[..., d + a])
        self.observations = self.observations.copy()
        version = snapshot.version if snapshot else None
        joined = self.n_step(rows, done, valid)
        return Experience(joined, int(valid.sum()), np.array(finished, np.float32), version)
