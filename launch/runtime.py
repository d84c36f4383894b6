"""The Run that trainers receive (the contract is launch/run.py)."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from launch.checkpoint import Checkpoint, CheckpointStore
from launch.config import RunConfig
from launch.console import RunConsole
from launch.disk import refusals_explained, write_atomically
from launch.images import grid, write_png
from launch.metrics import MetricsFiles
from launch.run import ActorGroup, Shared
from launch.run_directory import RunDirectory


class Backend(Protocol):
    """What carries actors: Ray, or this process. Created when the trainer first asks for it."""

    def actors(
        self, cls: type, count: int, resources: Mapping[str, float], args: tuple, kwargs: Mapping[str, Any], name: str
    ) -> ActorGroup: ...

    def share(self, value: Any) -> Shared: ...

    def close(self) -> None: ...


class Runtime:
    """A training run: writes everything below its directory, of which it is the only writer."""

    def __init__(
        self, job: str, settings: RunConfig, directory: RunDirectory, checkpoint: Checkpoint | None = None
    ) -> None:
        self.job, self.name, self.seed, self.device = job, directory.name, settings.seed, settings.device
        self.directory: Path = directory.root
        self.started_from = checkpoint.step if checkpoint else 0
        self.console = RunConsole(self.name, self.started_from)
        self._settings, self._files, self._checkpoint = settings, directory, checkpoint
        # After a kill the checkpoint knows best, after an interrupt the summary does.
        self._earlier_wall_s = max(
            checkpoint.wall_s if checkpoint else 0.0, directory.read_summary().get("wall_s", 0.0)
        )
        self._started = time.monotonic()
        self._backend: Backend | None = None
        self._step = self.started_from
        self._saved = checkpoint.step if checkpoint else None
        self._logged: dict[str, float] = {}
        self._summarized: dict[str, float] = {}
        self._open()

    def _open(self) -> None:
        self._files.lock()
        self._files.point_latest()
        self._store = CheckpointStore(self._files.checkpoints, self._settings.keep_checkpoints, self.console.print)
        self._metrics = MetricsFiles(self._files, self._checkpoint)
        self.summarize({})

    # Actors

    def actors(
        self, cls: type, count: int, resources: Mapping[str, float], *args: Any, name: str = "", **kwargs: Any
    ) -> ActorGroup:
        return self._carrier().actors(cls, count, resources, args, kwargs, name or cls.__name__.lower())

    def share(self, value: Any) -> Shared:
        return self._carrier().share(value)

    def _carrier(self) -> Backend:
        if self._backend is None:
            if self._settings.backend == "ray":
                from launch.ray_backend import RayBackend

                self._backend = RayBackend(self._settings, self._files.logs, self.console.print)
            else:
                from launch.local_group import LocalBackend

                self._backend = LocalBackend(self.device)
        return self._backend

    # Figures

    def log(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        figures = {name: float(value) for name, value in metrics.items()}
        self._step = max(self._step, step)
        self._logged.update(figures)
        self._metrics.write(step, figures)
        self.console.step(step, figures, total)

    def record(self, step: int, kind: str, rows: list[dict[str, Any]]) -> None:
        path = self._files.rollouts / f"{step}-{kind}.jsonl"
        with refusals_explained(path, "write"):
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        picture = grid(images)
        path = self._files.images / f"{step}-{name.replace('/', '-')}.png"
        with refusals_explained(path, "write"):
            path.parent.mkdir(exist_ok=True)
            write_png(path, picture)
            self._show(step, name, picture)

    def _show(self, step: int, name: str, picture: np.ndarray) -> None:
        self._metrics.write_picture(step, name, picture)

    def summarize(self, metrics: Mapping[str, float], status: str = "running") -> None:
        self._summarized.update({name: float(value) for name, value in metrics.items()})
        self._files.write_summary(
            {
                "job": self.job,
                "status": status,
                "seed": self.seed,
                "steps": self._step,
                "wall_s": round(self._wall_s(), 3),
                "checkpoint": self._saved,  # step of the newest: a resume knows from it whether one must be there
                "metrics": {**self.summary_metrics(), **self._logged, **self._summarized},
            }
        )

    def summary_metrics(self) -> dict[str, float]:
        return self._files.read_summary().get("metrics", {})

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.console.table(title, columns, rows)

    # State

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> None:
        self._store.save(step, state, score, self._wall_s(), self._metrics.lines)
        self._saved, self._step = step, max(self._step, step)
        self.summarize({})

    def restore(self) -> dict[str, Any] | None:
        return self._checkpoint.load() if self._checkpoint else None

    # The end

    def finish(self, status: str) -> None:
        """Write the last summary and print it: the figures that the trainer summarized, or else the last it logged."""
        self.summarize({}, status)
        title = f"{self.name}: {status} at step {self._step}"
        self._report(title, self._summarized or self._logged, self._files.summary)
        if status == "interrupted":
            self.console.print(f"continue it with: longstride resume {shlex.quote(str(self.directory))}")

    def _report(self, title: str, figures: Mapping[str, float], path: Path) -> None:
        self.console.close()
        rows = [[name, f"{value:.6g}"] for name, value in figures.items()]
        if rows:
            self.table(title, ["metric", "value"], rows)
        else:
            self.console.print(title)
        self.console.print(str(path))

    def close(self) -> None:
        """Stop the actors and let go of the directory."""
        self.console.close()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._metrics.close()
        self._files.unlock()

    def _wall_s(self) -> float:
        return self._earlier_wall_s + time.monotonic() - self._started


class EvaluationRuntime(Runtime):
    """Looks at a checkpoint: metrics go to the console and, once it is done, as a line to evaluations.jsonl; the run's
    history and summary, its checkpoints and its lock are left alone, so a run can be evaluated while it trains.

    flags: those of the command, which the line tells; what they do not set is as in config.yaml.
    """

    def __init__(
        self,
        job: str,
        settings: RunConfig,
        directory: RunDirectory,
        checkpoint: Checkpoint | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(job, settings, directory, checkpoint)
        self._flags = list(flags)

    def _open(self) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, float], total: int | None = None) -> None:
        self.console.step(step, {name: float(value) for name, value in metrics.items()}, total)

    def _show(self, step: int, name: str, picture: np.ndarray) -> None:
        pass  # TensorBoard's files are part of the history

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> None:
        raise RuntimeError("an evaluation does not save checkpoints")

    def summarize(self, metrics: Mapping[str, float], status: str = "running") -> None:
        self._summarized.update({name: float(value) for name, value in metrics.items()})

    def finish(self, status: str) -> None:
        path = self._files.evaluations
        if self._summarized:
            about = {"step": self.started_from, "time": round(time.time(), 3), "flags": self._flags}
            with refusals_explained(path, "write"), path.open("a") as file:
                file.write(json.dumps(about | self._summarized) + "\n")
        self._report(f"{self.name}: evaluation of step {self.started_from}, {status}", self._summarized, path)

    def close(self) -> None:
        self.console.close()
        if self._backend is not None:
            self._backend.close()
