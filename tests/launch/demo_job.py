"""A small job that uses all of the Run, and a command line that knows it:

python -m tests.launch.demo_job train demo
"""

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from launch import cli, jobs
from models.errors import UserError
from models.seeding import derive_seed

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


class Sampler:
    """Draws targets from nothing but its arguments, so a call may be repeated."""

    def __init__(self) -> None:
        self.shift = 0.0

    def load(self, shift: float) -> None:
        self.shift = shift

    def draw(self, seed: int, width: int, pause: float) -> np.ndarray:
        time.sleep(pause)
        return np.random.default_rng(seed).normal(size=width) + self.shift


def train(config: DemoConfig, run: "Run") -> None:
    torch.manual_seed(run.seed)
    model = torch.nn.Linear(config.width, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr, amsgrad=config.optimizer.amsgrad)
    seen: dict[int, int] = {}
    start = 0
    if (state := run.restore()) is not None:
        start, seen = state["step"], state["seen"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    samplers = run.actors(Sampler, config.workers, {"cpu": 1})
    samplers.broadcast("load", run.share(1.5), sticky=True)
    for step in range(start + 1, config.steps + 1):
        if step == config.fail_at:
            raise UserError(f"step {step}: the data are bad; use better ones")
        targets = draw(samplers, config, derive_seed(run.seed, "draw", step))
        loss = ((model.weight[0] - torch.from_numpy(targets).float()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen[step % 3] = seen.get(step % 3, 0) + 1
        run.record(step, "train", [{"target": float(value)} for value in targets])
        run.log(step, {"train/loss": loss.item(), "run/actor_restarts": samplers.restarts}, config.steps)
        state = {"step": step, "seen": seen, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        run.save(step, state, score=-loss.item())
    run.summarize({"eval/weight": model.weight.mean().item()})


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
    run.summarize({"heldout/weight": state["model"]["weight"].mean().item(), "heldout/step": state["step"]})


def plan(config: DemoConfig) -> list[tuple[str, int, float, float, float]]:
    return [("sampler", config.workers, 1, 0, 0.5)]


JOB = jobs.Job("tests.launch.demo_job:DemoConfig", "tests.launch.demo_job:train", "tests.launch.demo_job:evaluate")

if __name__ == "__main__":
    jobs.JOBS["demo"] = JOB
    sys.exit(cli.main())
