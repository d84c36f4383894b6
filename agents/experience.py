"""The worker of the agents that learn from a replay buffer.

Shapes: T steps, N environments, K transitions, W numbers a row (agents/replay.py), D an observation, A an action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.exploration import Exploration, Explorer
from agents.rollout import EVALUATION_ENVS, NumpyMLP
from envs.control.box_spaces import box_spaces
from envs.control.vector_env import as_vectors, make_vector_env
from models.errors import UserError
from models.seeding import derive_seed


@dataclass(frozen=True)
class Experience:
    """Transitions in the order in which they were played, as rows of the replay buffer, without autoreset dummies."""

    rows: np.ndarray  # (K, W) float32
    episode_returns: np.ndarray  # (E,) float32, of the episodes that ended, in order
    policy_version: int  # of the weights that played, -1 for uniformly random actions


class ExperienceWorker:
    """Plays `num_envs` environments. Weights are the actor network's, as one flat float32 vector."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        hidden: Sequence[int],
        exploration: Exploration,
        gamma: float,
        seed: int,
        actor_index: int = 0,
    ) -> None:
        self.env_id, self.gamma, self.seed, self.index = env_id, gamma, seed, actor_index
        self.spaces = box_spaces(env_id)
        action_size = self.spaces.action_size
        self.sizes = [self.spaces.observation_size, *hidden, exploration.outputs(action_size)]
        self.env = make_vector_env(env_id, num_envs)
        self.explorer = Explorer(exploration, num_envs, action_size)
        self.observations: np.ndarray | None = None  # None: episodes have yet to begin
        self.done = np.zeros(num_envs, bool)
        self.returns = np.zeros(num_envs, np.float32)

    def collect(self, weights: np.ndarray | None, version: int, steps: int, round: int, restart: bool) -> Experience:
        """Play `steps` steps of each environment, going on where the last call stopped.

        weights: None for actions that are uniformly random. restart: begin new episodes. All randomness comes from the
        run's seed, the worker's number and `round`, so that a call after a restart depends on nothing that came before
        it; a replaced worker restarts on its own. Raises UserError if the environment returns numbers that are not
        finite.
        """
        rng = np.random.default_rng(derive_seed(self.seed, "actions", self.index, round))
        policy = None if weights is None else ReluMLP(self.sizes, weights)
        if restart or self.observations is None:
            first, _ = self.env.reset(seed=derive_seed(self.seed, "episodes", self.index, round))
            self.observations = as_vectors(first, self.env_id)
            self.explorer.begin(np.ones(len(self.done), bool))
            self.done[:] = False
            self.returns[:] = 0
        n, d, a = len(self.done), self.spaces.observation_size, self.spaces.action_size
        rows = np.empty((steps, n, 2 * d + a + 2), np.float32)
        valid = np.empty((steps, n), bool)
        finished: list[float] = []
        for t in range(steps):
            if policy is None:
                actions = rng.uniform(-1, 1, (n, a)).astype(np.float32)
            else:
                actions = self.explorer.act(policy(self.observations), rng)
            valid[t] = ~self.done
            rows[t, :, :d] = self.observations
            rows[t, :, d : d + a] = actions
            observations, rewards, terminated, truncated, _ = self.env.step(self._scaled(actions))
            rows[t, :, d + a] = rewards
            rows[t, :, d + a + 1] = self.gamma * ~terminated
            rows[t, :, d + a + 2 :] = observations
            self.observations = rows[t, :, d + a + 2 :]
            self.done = terminated | truncated
            self.returns += rewards
            if self.done.any():
                finished += self.returns[self.done].tolist()
                self.returns[self.done] = 0
                self.explorer.begin(self.done)
        self.observations = self.observations.copy()
        kept = rows[valid]
        if not np.isfinite(kept).all():
            raise UserError(f"{self.env_id} returned an observation or a reward that is not finite")
        return Experience(kept, np.array(finished, np.float32), -1 if weights is None else version)

    def evaluate(self, weights: np.ndarray, episodes: int, seed: int) -> np.ndarray:
        """Returns (episodes,) of the policy without noise, on environments of their own."""
        if episodes == 0:
            return np.empty(0, np.float32)
        policy = ReluMLP(self.sizes, weights)
        env = make_vector_env(self.env_id, n := min(episodes, EVALUATION_ENVS))
        left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        running, returns = np.zeros(n), []
        observations, _ = env.reset(seed=derive_seed(seed, "evaluation", self.index))
        while left.any():
            actions = self.explorer.greedy(policy(as_vectors(observations, self.env_id)))
            observations, rewards, terminated, truncated, _ = env.step(self._scaled(actions))
            running += rewards
            done = terminated | truncated
            returns += running[done & (left > 0)].tolist()
            left[done & (left > 0)] -= 1
            running[done] = 0
        env.close()
        return np.array(returns, np.float32)

    def close(self) -> None:
        self.env.close()

    def _scaled(self, actions: np.ndarray) -> np.ndarray:
        return self.spaces.low + (actions + 1) / 2 * (self.spaces.high - self.spaces.low)


class ReluMLP(NumpyMLP):
    def __call__(self, x_ND: np.ndarray) -> np.ndarray:
        *hidden, (weight, bias) = self.layers
        for hidden_weight, hidden_bias in hidden:
            x_ND = np.maximum(x_ND @ hidden_weight + hidden_bias, 0)
        return x_ND @ weight + bias
