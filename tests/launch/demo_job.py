"""A small job that uses all of the Run, and a command line that knows it:

python -m tests.launch.demo_job train demo
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from launch import cli, jobs
from models.errors import UserError
from models.seeding import derive_seed
from tests.launch.actors import Sampler

if TYPE_CHECKING:
    from launch.run import Run


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 0.1
    amsgrad: bool = False


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    steps: int = 8
    pause: float = 0.0
    width: int = 4
    workers: int = 2
    fail_at: int = 0
    """Step at which the data turn out bad."""
    loss: Literal["mse", "l1"] = "mse"
    target: float | None = None
    tags: tuple[str, ...] = ("a", "b")
    optimizer: OptimizerConfig = OptimizerConfig()


def train(config: DemoConfig, run: "Run") -> None:
    weight = torch.randn(config.width, generator=torch.Generator().manual_seed(run.seed))
    momentum = np.zeros(config.width, dtype=np.float32)
    seen: dict[int, int] = {}
    start = 0
    if (state := run.restore()) is not None:
        start, seen, weight, momentum = state["step"], state["seen"], state["weight"], state["momentum"]
    samplers = run.actors(Sampler, config.workers, {"cpu": 1})
    samplers.broadcast("load", run.share(1.5), sticky=True)
    for step in range(start + 1, config.steps + 1):
        if step == config.fail_at:
            raise UserError(f"step {step}: the data are bad; use better ones")
        targets = draw(samplers, config, derive_seed(run.seed, "draw", step))
        error = weight - torch.from_numpy(targets).float()
        momentum = 0.9 * momentum + error.numpy()
        weight = weight - config.optimizer.lr * torch.from_numpy(momentum)
        loss = error.square().mean().item()
        seen[step % 3] = seen.get(step % 3, 0) + 1
        run.record(step, "train", [{"target": float(value)} for value in targets])
        run.log(step, {"train/loss": loss, "run/actor_restarts": samplers.restarts}, config.steps)
        run.save(step, {"step": step, "seen": seen, "weight": weight, "momentum": momentum}, score=-loss)
    run.summarize({"eval/weight": weight.mean().item()})


def draw(samplers: Any, config: DemoConfig, seed: int) -> np.ndarray:
    def ask(index: int) -> Any:
        return samplers.call(index, "draw", derive_seed(seed, index), config.width, config.pause, timeout_s=60)

    futures = [ask(index) for index in range(len(samplers))]
    draws = []
    for index, future in enumerate(futures):
        while True:
            try:
                draws.append(future.result())
                break
            except ConnectionError:
                future = ask(index)
    return np.mean(draws, axis=0)


def evaluate(config: DemoConfig, run: "Run") -> None:
    state = run.restore()
    assert state is not None
    run.summarize({"heldout/weight": state["weight"].mean().item(), "heldout/step": state["step"]})


def plan(config: DemoConfig, device: str) -> list[tuple[str, int, float, float, float]]:
    return [("sampler", config.workers, 1, 0, 0.5)]


JOB = jobs.Job("tests.launch.demo_job:DemoConfig", "tests.launch.demo_job:train", "tests.launch.demo_job:evaluate")

if __name__ == "__main__":
    jobs.JOBS["demo"] = JOB
    sys.exit(cli.main())
