"""The Run: all that a trainer gets from outside. Trainers import nothing of launch/ at run time.

A trainer is a function `train(config, run) -> None`. It starts actors, shares weights, logs, saves and restores
through `run`, and does not know whether Ray or one process carries it (`--backend ray|local`).
"""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ActorDied(ConnectionError):
    """The process of an actor ended, or a call ran past its time limit and the actor was ended.

    The call that was lost raises this from its Future; the trainer re-issues it (the group has already begun to
    start a new actor and re-give it its state). `str(error)` names the actor, the call, the cause of death and the
    last lines of the actor's log file. Trainers catch it as the built-in `ConnectionError`.
    """


class CallTimedOut(ActorDied, TimeoutError):
    """A call ran past its own time limit. Trainers catch it as the built-in `TimeoutError`, before `ConnectionError`.

    The calls that waited behind it raise `ActorDied`: their time had not begun.
    """


class Shared(Protocol):
    """An object put once for all actors by `Run.share`, or left in place by a call with `share_result=True`.

    Passed as an argument of a call it arrives as the object itself (zero-copy for numpy arrays under Ray, which are
    then read-only).
    """

    def get(self) -> Any: ...


class ActorGroup(Protocol):
    """`count` actors of one class."""

    restarts: int  # actors replaced so far

    def __len__(self) -> int: ...

    def call(
        self,
        index: int,
        method: str,
        *args: Any,
        timeout_s: float | None = None,
        share_result: bool = False,
        **kwargs: Any,
    ) -> "Future[Any]":
        """Call one actor. Calls to the same actor run in the order they were made.

        An exception raised by the method is raised by the Future with its own type. A dead actor raises `ActorDied`,
        an expired time limit `CallTimedOut`. With `share_result` the Future holds a `Shared` handle and the result does
        not travel through the driver.
        """
        ...

    def broadcast(
        self, method: str, *args: Any, timeout_s: float | None = None, sticky: bool = False, **kwargs: Any
    ) -> "list[Future[Any]]":
        """Call every actor. A `sticky` call is the actors' state: the latest one of each method is repeated on a
        restarted actor before anything else (weights, for example)."""
        ...

    def close(self) -> None: ...


class Run(Protocol):
    """One run of one job, and its directory."""

    name: str
    seed: int
    directory: Path  # runs/<name>/
    device: str  # "cpu" or "cuda"
    started_from: int  # step of the checkpoint that restore() returns, 0 for a fresh run

    def actors(
        self, cls: type, count: int, resources: Mapping[str, float], *args: Any, name: str = "", **kwargs: Any
    ) -> ActorGroup:
        """Start `count` actors `cls(*args, **kwargs)`.

        resources: what one actor takes, `{"cpu": 1, "gpu": 0.5}`. `cls` is importable by path. A parameter of
        `cls.__init__` named `actor_index` receives the actor's number. Raises the constructor's own exception if an
        actor cannot be built.
        """
        ...

    def share(self, value: Any) -> Shared: ...

    def log(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        """Write metrics of one step to TensorBoard, metrics.jsonl and the console (one line a step, progress bar)."""
        ...

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> None:
        """Write a checkpoint atomically; keep the last k and the best by `score`.

        state: a tree of dicts and lists whose leaves are torch tensors, numpy arrays, numbers, strings, bools, None.
        Tensors go to safetensors, the rest to JSON; nothing is pickled. Raises UserError if the disk is full or
        read-only; the previous checkpoints stay.
        """
        ...

    def restore(self) -> dict[str, Any] | None:
        """Return the state of the newest complete checkpoint of this run, or None for a fresh run."""
        ...

    def record(self, step: int, kind: str, rows: "list[dict[str, Any]]") -> None:
        """Write rows (completions with their rewards) to rollouts/<step>-<kind>.jsonl, whole and atomically: what an
        interrupted attempt at the same step left there is replaced."""
        ...

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write images (N, H, W, 3) uint8 as one picture to images/<step>-<name>.png and to TensorBoard; `name` may
        have slashes, as metrics do."""
        ...

    def summarize(self, metrics: Mapping[str, float], status: str = "running") -> None:
        """Merge final figures into summary.json (written atomically; also after each evaluation while it trains).

        Those of `longstride evaluate` become a line of evaluations.jsonl instead."""
        ...

    def summary_metrics(self) -> dict[str, float]:
        """The metrics that summary.json holds so far (also those of the run before it was resumed)."""
        ...

    def table(self, title: str, columns: list[str], rows: "list[list[str]]") -> None:
        """Print a table on the console."""
        ...
