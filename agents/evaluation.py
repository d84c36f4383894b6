"""How good a policy is: whole episodes, played by all workers, greedily or sampled; and the checkpoint of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from agents.config import ControlConfig
from agents.pipeline import call_each
from agents.rollout import Snapshot
from agents.statistics import bootstrap_interval
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from launch.run import ActorGroup, Run

SLICES = 4  # of a worker's time limit: one is how long it plays before it shows that it lives
UNLOGGED = "unlogged"  # in a checkpoint's state: metrics of the line whose evaluation failed


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


class Learner(Protocol):
    """Whose policy it is."""

    env_steps: int
    round: int

    def snapshot(self) -> Snapshot: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def start_workers(self, run: "Run") -> "ActorGroup": ...


def play_episodes(
    config: ControlConfig, workers: "ActorGroup", snapshot: Snapshot, seed: int, greedy: bool = True
) -> Evaluation:
    """Share `eval_episodes` episodes among the workers. Raises UserError if they fail or hang."""
    shares = [len(share) for share in np.array_split(np.arange(config.eval_episodes), len(workers))]
    calls = [(snapshot, episodes, seed, greedy, config.worker_timeout_s / SLICES) for episodes in shares]
    played = call_each(workers, "evaluate", calls, config.worker_timeout_s)
    returns, lengths = (np.concatenate(parts) for parts in zip(*played))
    return Evaluation(returns, lengths)


def evaluate_and_save(
    config: ControlConfig,
    run: "Run",
    workers: "ActorGroup",
    learner: Learner,
    metrics: "Mapping[str, float]",
    state: "Callable[[], dict[str, Any]]",
) -> None:
    """Play the greedy policy, log `eval/...` with `metrics`, and save a checkpoint of what `state` returns.

    Whatever ends the evaluation, what was learnt before it is saved: without a score, and with the metrics that a
    resumed run has yet to log.
    """
    seed = derive_seed(run.seed, "evaluation", learner.round)
    try:
        found = play_episodes(config, workers, learner.snapshot(), seed).metrics()
    except BaseException:
        run.save(learner.env_steps, state() | {UNLOGGED: dict(metrics)})
        raise
    run.log(learner.env_steps, found | dict(metrics), config.steps)
    run.save(learner.env_steps, state(), score=found["eval/return_mean"])
    run.summarize(found)


def catch_up(
    config: ControlConfig,
    run: "Run",
    workers: "ActorGroup",
    learner: Learner,
    restored: "Mapping[str, Any]",
    state: "Callable[[], dict[str, Any]]",
) -> None:
    """Make up for the evaluation that failed after the checkpoint `restored`, if one did."""
    if UNLOGGED in restored:
        evaluate_and_save(config, run, workers, learner, restored[UNLOGGED], state)


def evaluate(config: ControlConfig, run: "Run", learner: Learner) -> None:
    """The `evaluate` command, on the policy of the run's checkpoint: greedy episodes to `eval/...`, sampled ones to
    `eval/sampled/...`, as many of each as `eval/episodes` says, and each episode to the run's rollouts, where `videos`
    of them are filmed."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    learner.load_state(state)
    workers, snapshot = learner.start_workers(run), learner.snapshot()
    metrics: dict[str, float] = {}
    rows = []
    for kind, prefix in [("greedy", "eval"), ("sampled", "eval/sampled")]:
        seed = derive_seed(run.seed, "evaluate", kind)
        played = play_episodes(config, workers, snapshot, seed, greedy=kind == "greedy")
        metrics |= played.metrics(prefix)
        pairs = zip(played.returns.tolist(), played.lengths.tolist())
        rows += [{"policy": kind, "return": value, "length": length} for value, length in pairs]
    metrics["eval/episodes"] = float(config.eval_episodes)
    run.record(run.started_from, "evaluation", rows)
    for number in range(config.videos):
        seed = derive_seed(run.seed, "video", number)
        call = (snapshot, seed, config.worker_timeout_s / SLICES)
        (film,) = call_each(workers, "film", [call], config.worker_timeout_s)
        (run.directory / "rollouts" / f"{run.started_from}-{number}.gif").write_bytes(film)
    run.log(run.started_from, metrics)
    run.summarize(metrics)
