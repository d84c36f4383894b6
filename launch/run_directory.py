"""The folder of one run: where each thing is, and who may write to it.

runs/latest -> <name>                                             (of single runs)
runs/<name>/config.yaml  metrics.jsonl  summary.json  evaluations.jsonl  tb/  checkpoints/  rollouts/  images/  logs/
runs/<seeds>/seed-<seed>/  runs/<sweep>/trials/<trial>/           (run directories too)
"""

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from launch.disk import refusals_explained, write_atomically
from models.errors import UserError, nearest

# What a folder below runs/ holds, by a file in it.
HOLDS = {
    "config.yaml": "a run: continue it with `longstride resume {folder}`",
    "recipe.yaml": "the runs of several seeds: the same command with --seeds goes on with them",
    "sweep.yaml": "the trials of a sweep: the same command goes on with them",
}


def folder_to_fill(runs_dir: Path, name: str, mark: str) -> Path:
    """The folder `name`, which need not exist. mark: the file of HOLDS that it may have already, or "".

    Raises UserError if `name` cannot name a folder below `runs_dir`, or if the folder holds something else.
    """
    if not name or name in {".", "..", "latest"} or "/" in name or name.startswith((".", "-")):
        raise UserError(f"--name {name!r} cannot name a run: use letters, digits, '-', '_' and '.'")
    folder = runs_dir / name
    with refusals_explained(folder, "use the folder"):
        held = _held(folder, but=mark)
    if held:
        raise UserError(f"{folder} exists already and holds {held}, or choose another --name")
    return folder


def _held(folder: Path, but: str = "") -> str | None:
    found = [what for file, what in HOLDS.items() if file != but and (folder / file).exists()]
    return found[0].format(folder=shlex.quote(str(folder))) if found else None


class RunDirectory:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.summary = root / "summary.json"
        self.evaluations = root / "evaluations.jsonl"
        self.tensorboard = root / "tb"
        self.checkpoints = root / "checkpoints"
        self.rollouts = root / "rollouts"
        self.images = root / "images"
        self.logs = root / "logs"
        self._lock: TextIO | None = None
        self._latest_before: str | None = None

    @property
    def name(self) -> str:
        return self.root.name

    @classmethod
    def free(cls, runs_dir: Path, name: str) -> "RunDirectory":
        """The folder of a run to be. Raises UserError for a name that cannot be one, or is one already."""
        directory = cls(folder_to_fill(runs_dir, name, ""))
        with refusals_explained(directory.root, "create the run directory"):
            if directory.root.exists():
                raise _taken(directory.root)
        return directory

    @classmethod
    def create(cls, runs_dir: Path, name: str, config: Mapping[str, Any]) -> "RunDirectory":
        """Make the folder of a fresh run. Raises UserError if it exists or cannot be made."""
        directory = cls.free(runs_dir, name)
        with refusals_explained(directory.root, "create the run directory"):
            runs_dir.mkdir(parents=True, exist_ok=True)
            try:
                directory.root.mkdir()
            except FileExistsError:  # somebody was faster
                raise _taken(directory.root) from None
            for folder in (directory.tensorboard, directory.checkpoints, directory.rollouts, directory.logs):
                folder.mkdir()
            write_atomically(directory.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return directory

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> "RunDirectory":
        """Find an existing run by its name under `runs_dir` (also `latest`, or as in `seeds/seed-0`) or by its path.

        Raises UserError naming the nearest run if there is none.
        """
        for root in (runs_dir / name, Path(name)):
            if (root / "config.yaml").is_file():
                return cls(root.resolve())
            if held := _held(root):
                raise UserError(f"{root} holds {held}; `longstride runs` names each of them")
        known = [str(directory.root.relative_to(runs_dir)) for directory in cls.all(runs_dir)]
        hint = f"did you mean {nearest(name, known)}?" if known else "there is no run yet"
        raise UserError(f"no run {name!r} under {runs_dir}: {hint}")

    @classmethod
    def all(cls, runs_dir: Path) -> "list[RunDirectory]":
        """Every run, also those of seeds and sweeps, the oldest first."""
        patterns = ("*/config.yaml", "*/seed-*/config.yaml", "*/trials/*/config.yaml")
        roots = [path.parent for pattern in patterns for path in runs_dir.glob(pattern)]
        base = runs_dir.resolve()
        roots = [root for root in roots if root.resolve() == base / root.relative_to(runs_dir)]  # `latest` is no name
        return [cls(root) for root in sorted(roots, key=lambda root: (root / "config.yaml").stat().st_mtime)]

    def read_config(self) -> dict[str, Any]:
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {self.config}: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict) or "job" not in config:
            raise UserError(f"{self.config} does not name its job: restore the file as the run wrote it")
        return config

    def read_summary(self) -> dict[str, Any]:
        """The run's summary, or {} before the first one and for a file that holds none."""
        try:
            with refusals_explained(self.summary, "read"):
                summary = json.loads(self.summary.read_text())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        metrics = summary.get("metrics", {}) if isinstance(summary, dict) else None
        whole = isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
        return summary if whole else {}

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        with refusals_explained(self.summary, "write"):
            write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def has_begun(self) -> bool:
        """Whether a step was logged or a checkpoint written."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or any(self.checkpoints.glob("step-*"))

    def lock(self) -> None:
        """Become the run's only writer until `unlock` or death. Raises UserError if another process is.

        The kernel drops the lock with the process, so a kill -9 leaves none behind, and a lock of this kind does not
        pass to forked children, which may outlive it.
        """
        if self._lock is not None:
            return
        with refusals_explained(self.root, "lock"):
            file = (self.root / ".lock").open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                raise UserError(f"{self.root} is being written by process {owner}: wait for it or end it") from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        self._lock = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_live(self) -> bool:
        """Whether some other process is writing this run now."""
        path = self.root / ".lock"
        if not path.exists() or self._lock is not None:
            return False
        with refusals_explained(path, "read"), path.open() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which needs no right to write
            except BlockingIOError:
                return True
        return False

    def point_latest(self) -> None:
        """Make runs/latest name this run."""
        self._latest_before = os.readlink(self._latest) if self._latest.is_symlink() else None
        self._link_latest(self.root.name)

    def discard(self) -> None:
        """Remove the folder of a run that never began; runs/latest then names what it named before, if it is there."""
        if self._latest.is_symlink() and os.readlink(self._latest) == self.root.name:
            if self._latest_before and (self.root.parent / self._latest_before).is_dir():
                self._link_latest(self._latest_before)
            else:  # another one that was discarded, say: of seeds that run at once
                self._latest.unlink()
        shutil.rmtree(self.root)

    @property
    def _latest(self) -> Path:
        return self.root.parent / "latest"

    def _link_latest(self, target: str) -> None:
        draft = self._latest.with_name(f".latest.{os.getpid()}")
        with refusals_explained(self._latest, "create the link"):
            draft.unlink(missing_ok=True)
            draft.symlink_to(target)
            draft.replace(self._latest)


def _taken(root: Path) -> UserError:
    return UserError(f"{root} exists already: choose another --name")
