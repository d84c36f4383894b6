"""Checkpoints that survive a kill -9 at any moment.

    checkpoints/step-00000120/
        tensors.safetensors   torch tensors, bf16 included
        arrays.safetensors    numpy arrays
        state.json            the rest of the tree, with references into the two files above
        manifest.json         step, score, wall-clock seconds, lines of metrics, and size and SHA-256 of each file

A checkpoint is written under a hidden name, flushed to the disk, and renamed: it is there whole or not at all. Should
a file be damaged later, its digest shows it and the next older checkpoint is used. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch

from launch.disk import refusals_explained, sync_directory, sync_file
from launch.state_tree import FlatState, flatten, unflatten
from models.errors import UserError

TENSORS, ARRAYS, STATE, MANIFEST = "tensors.safetensors", "arrays.safetensors", "state.json", "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: every file has the size that its manifest names."""

    path: Path
    step: int
    attempt: int  # a step saved again, after a resume, does not overwrite the first one
    score: float | None
    wall_s: float  # run time until then, over all sessions of the run
    metric_lines: int  # of metrics.jsonl until then
    files: Mapping[str, Mapping[str, Any]]

    @property
    def order(self) -> tuple[int, int]:
        return self.step, self.attempt

    def damage(self) -> str | None:
        """Compare each file with its digest; return what is wrong, or None."""
        for name, expected in self.files.items():
            with (self.path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} differs from its checksum"
        return None

    def load(self) -> dict[str, Any]:
        flat = FlatState(
            tree=json.loads((self.path / STATE).read_text()),
            tensors=safetensors.torch.load_file(self.path / TENSORS),
            arrays=safetensors.numpy.load_file(self.path / ARRAYS),
        )
        return unflatten(flat)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check sizes. Raises ValueError saying what is missing or cut short."""
    try:
        manifest = _as_mapping(json.loads((path / MANIFEST).read_text()))
        if (version := manifest["format"]) != FORMAT:
            raise UserError(f"{path} has checkpoint format {version}; this longstride reads format {FORMAT}")
        step, _, attempt = path.name.removeprefix("step-").partition(".")
        fields = (manifest[name] for name in ("score", "wall_s", "metric_lines", "files"))
        checkpoint = Checkpoint(path, int(step), int(attempt or 0), *fields)
        sizes = {name: _as_mapping(facts)["bytes"] for name, facts in _as_mapping(checkpoint.files).items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (json.JSONDecodeError, KeyError, ValueError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from None
    for name, expected in sizes.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != expected:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {expected}")
    return checkpoint


def _as_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{json.dumps(value)[:20]} stands where there should be names and values")
    return value


class CheckpointStore:
    """The checkpoints of one run. keep: how many of the newest stay, beside the one with the highest score.

    warn: is told of each checkpoint that had to be skipped.
    """

    def __init__(self, root: Path, keep: int, warn: Any = print) -> None:
        self.root, self.keep, self.warn = root, keep, warn

    def save(
        self, step: int, state: Mapping[str, Any], score: float | None, wall_s: float, metric_lines: int = 0
    ) -> Path:
        """Write atomically, then drop what need not be kept.

        Raises UserError if the disk is full or refuses, TypeError for a leaf that is not data; either way the
        earlier checkpoints stay as they were.
        """
        flat = flatten(state)
        with refusals_explained(self.root, f"save the checkpoint of step {step} in"):
            self._sweep()
            draft = self.root / f".draft-{step}-{os.getpid()}"
            draft.mkdir(parents=True)
            try:
                self._write(draft, flat, {"step": step, "score": score, "wall_s": wall_s, "metric_lines": metric_lines})
                target = self._free_name(step)
                draft.rename(target)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            sync_directory(self.root)
            self._prune()
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. Damaged ones are skipped with a warning."""
        for path in sorted(self.root.glob("step-*"), reverse=True, key=_name_order):
            try:
                checkpoint = read(path)
                problem = checkpoint.damage()
            except (ValueError, FileNotFoundError) as error:
                problem = str(error)
            if problem is None:
                return checkpoint
            self.warn(f"skipping the damaged checkpoint {path}: {problem}")
        return None

    def _write(self, draft: Path, flat: FlatState, facts: Mapping[str, Any]) -> None:
        safetensors.torch.save_file(flat.tensors, draft / TENSORS)
        safetensors.numpy.save_file(flat.arrays, draft / ARRAYS)
        (draft / STATE).write_text(json.dumps(flat.tree))
        files = {}
        for name in (TENSORS, ARRAYS, STATE):
            with (draft / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": (draft / name).stat().st_size, "sha256": digest}
        manifest = {"format": FORMAT, **facts, "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*files, MANIFEST):
            sync_file(draft / name)
        sync_directory(draft)

    def _free_name(self, step: int) -> Path:
        path, attempt = self.root / f"step-{step:08d}", 0
        while path.exists():
            attempt += 1
            path = self.root / f"step-{step:08d}.{attempt}"
        return path

    def _prune(self) -> None:
        whole: list[Checkpoint] = []
        for path in self.root.glob("step-*"):
            try:
                whole.append(read(path))
            except ValueError:
                continue  # damaged: evidence for the user, and `newest` tells of it
        whole.sort(key=lambda checkpoint: checkpoint.order)
        scored = [checkpoint for checkpoint in whole if checkpoint.score is not None]
        kept = whole[-self.keep :] + ([max(scored, key=lambda c: (c.score, c.order))] if scored else [])
        for checkpoint in whole:
            if checkpoint not in kept:
                # Renamed first, so that nobody sees a checkpoint lose its files one by one.
                doomed = self.root / f".doomed-{checkpoint.path.name}"
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed)

    def _sweep(self) -> None:
        """Remove what a killed writer left behind. A run has one writer (RunDirectory.lock), so nobody is at work."""
        for pattern in (".draft-*", ".doomed-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path)


def _name_order(path: Path) -> tuple[int, int]:
    step, _, attempt = path.name.removeprefix("step-").partition(".")
    return (int(step), int(attempt or 0)) if step.isdigit() else (-1, 0)
