"""How good a policy is: whole episodes, played by all workers, greedily or sampled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agents.config import ControlConfig
from agents.rollout import RolloutConfig, RolloutWorker, Snapshot, call_each
from agents.statistics import bootstrap_interval
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.run import ActorGroup, Run
    from models.control.numpy_policies import NumpyPolicy


@dataclass(frozen=True)
class Evaluation:
    returns: np.ndarray  # (E,) float32
    lengths: np.ndarray  # (E,) int64

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Mean, standard deviation, and the 95% interval of the mean by percentile bootstrap over the episodes."""
        low, high = bootstrap_interval(self.returns)
        return {
            f"{prefix}/return_mean": float(self.returns.mean()),
            f"{prefix}/return_std": float(self.returns.std()),
            f"{prefix}/return_ci95_low": low,
            f"{prefix}/return_ci95_high": high,
            f"{prefix}/length_mean": float(self.lengths.mean()),
        }


def start_workers(config: ControlConfig, run: "Run", policy: "Callable[[np.ndarray], NumpyPolicy]") -> "ActorGroup":
    """Of an agent that learns on the CPU. Raises UserError if the run is to use a GPU."""
    if run.device != "cpu":
        raise UserError(
            f"--device {run.device}: this agent learns on the CPU, leave it out; ddpg, td3 and sac take a GPU"
        )
    rollout = RolloutConfig(config.env, config.envs_per_worker, policy, run.seed, config.gamma, config.step_timeout_s)
    return run.actors(RolloutWorker, config.workers, {"cpu": 1}, rollout, name="rollout")


def play_episodes(
    config: ControlConfig, workers: "ActorGroup", snapshot: Snapshot, seed: int, greedy: bool = True
) -> Evaluation:
    """Share `eval_episodes` episodes among the workers."""
    shares = [len(share) for share in np.array_split(np.arange(config.eval_episodes), len(workers))]
    calls = [(snapshot, episodes, seed, greedy) for episodes in shares]
    played = call_each(workers, "evaluate", calls, config.worker_timeout_s)
    returns, lengths = (np.concatenate(parts) for parts in zip(*played))
    return Evaluation(returns, lengths)


def evaluate_checkpoint(config: ControlConfig, run: "Run", workers: "ActorGroup", snapshot: Snapshot) -> None:
    """The `evaluate` command: greedy episodes to `eval/...`, sampled ones to `eval/sampled/...`, and each episode to
    the run's rollouts, where `videos` of them are filmed."""
    metrics: dict[str, float] = {}
    rows = []
    for kind, prefix in [("greedy", "eval"), ("sampled", "eval/sampled")]:
        seed = derive_seed(run.seed, "evaluate", kind)
        played = play_episodes(config, workers, snapshot, seed, greedy=kind == "greedy")
        metrics |= played.metrics(prefix)
        pairs = zip(played.returns.tolist(), played.lengths.tolist())
        rows += [{"policy": kind, "return": value, "length": length} for value, length in pairs]
    run.record(run.started_from, "evaluation", rows)
    for number in range(config.videos):
        seed = derive_seed(run.seed, "video", number)
        film = workers.call(0, "film", snapshot, seed, timeout_s=config.worker_timeout_s).result()
        (run.directory / "rollouts" / f"{run.started_from}-{number}.gif").write_bytes(film)
    run.log(run.started_from, metrics)
    run.summarize(metrics)
