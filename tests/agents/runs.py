"""Runs in this process, for tests of trainers."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch import jobs
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.run_directory import RunDirectory
from launch.runtime import Runtime


def runtime(path: Path, name: str, seed: int = 0, resume: bool = False) -> Runtime:
    settings = RunConfig(name=name, runs_dir=path, seed=seed, backend="local", keep_checkpoints=10)
    if resume:
        directory = RunDirectory.open(path, name)
        return Runtime("test", settings, directory, CheckpointStore(directory.checkpoints, 10).newest())
    return Runtime("test", settings, RunDirectory.create(path, name, {"job": "test"}))


def train(job: str, config: Any, path: Path, name: str, **options: Any) -> dict[str, float]:
    """Returns the metrics in the run's summary."""
    run = runtime(path, name, **options)
    try:
        jobs.find(job).trainer()(config, run)
    finally:
        run.close()
    return json.loads((path / name / "summary.json").read_text())["metrics"]


def failing_at(number: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """The function, whose call `number`, from 1 on, raises the error."""
    calls = itertools.count(1)

    def called(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **options)

    return called


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def train_until_killed(job: str, config: Any, path: Path, name: str, step: int) -> None:
    """Die when metrics of a step after `step` are to be logged."""
    run = runtime(path, name)
    log = run.log

    def log_until_killed(now: int, *args: Any) -> None:
        if now > step:
            raise Killed
        log(now, *args)

    run.log = log_until_killed  # type: ignore[method-assign]
    try:
        jobs.find(job).trainer()(config, run)
    except Killed:
        return
    finally:
        run.close()
    raise AssertionError(f"nothing was logged after step {step}")


def final_state(path: Path, name: str) -> dict[str, Any]:
    checkpoint = CheckpointStore(path / name / "checkpoints", 10).newest()
    assert checkpoint is not None
    return checkpoint.load()


def metrics(path: Path, name: str) -> list[dict[str, float]]:
    """What was logged, without times."""
    rows = [json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif hasattr(a, "shape"):
        assert (a == b).all()
    else:
        assert a == b
