"""The replay buffer: transitions in one ring of packed float32 rows, and the files that a resumed run reads it from.

A row is  observation (D) | action (A) | reward | discount | next observation (D),  so that a batch is one gather, and a
batch's critic input (observation and action side by side) is a view of it.

`discount` is γ, or 0 if the step ended its episode by itself. A step cut off by a time limit keeps γ and its true final
observation: the episode would have gone on. Autoreset dummies are never stored.

Checkpoints. A buffer of a million rows is too much to write at every checkpoint, and most of it was written at the
earlier ones: rows never change. So what was added since the last save goes to a file of its own beside the
checkpoints, and a checkpoint only names the files that it needs, with their digests.

    replay/rows-000000000000-000000050000.safetensors     the first 50,000 transitions of the run
    replay/rows-000000050000-000000100000.safetensors     ...

A file is written whole (under a hidden name, flushed, renamed) before the checkpoint that names it.
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from models.errors import UserError

SAVES_KEPT = 10  # files that only checkpoints older than the last 10 need are removed
ROWS = "rows"  # the one array of a file


@dataclass(frozen=True)
class Transitions:
    """A batch of B transitions; all are views of one gathered tensor."""

    observations_BD: Tensor
    actions_BA: Tensor
    observations_actions_BX: Tensor  # the two side by side, X = D + A: what a Q critic takes
    rewards_B: Tensor
    discounts_B: Tensor
    next_observations_BD: Tensor


class ReplayBuffer:
    """The latest `capacity` transitions."""

    def __init__(
        self, capacity: int, observation_size: int, action_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.capacity, self.observation_size, self.action_size = capacity, observation_size, action_size
        width = 2 * observation_size + action_size + 2
        self.rows_CW = torch.empty(capacity, width, device=device)  # a CPU's memory is taken only as it fills
        self.added = 0  # transitions so far, also those that were overwritten

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, rows_KW: np.ndarray) -> None:
        """Append K transitions. The oldest make room."""
        skipped = max(0, len(rows_KW) - self.capacity)  # these would be overwritten by the rest
        positions = torch.arange(self.added + skipped, self.added + len(rows_KW)) % self.capacity
        device = self.rows_CW.device
        self.rows_CW[positions.to(device)] = torch.tensor(rows_KW[skipped:], device=device)
        self.added += len(rows_KW)

    def draw(self, batches: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Positions (batches, B), uniformly, with replacement."""
        return torch.randint(len(self), (batches, batch_size), generator=generator).to(self.rows_CW.device)

    def take(self, positions_B: Tensor) -> Transitions:
        d, x = self.observation_size, self.observation_size + self.action_size
        batch_BW = self.rows_CW.index_select(0, positions_B)
        return Transitions(
            observations_BD=batch_BW[:, :d],
            actions_BA=batch_BW[:, d:x],
            observations_actions_BX=batch_BW[:, :x],
            rewards_B=batch_BW[:, x],
            discounts_B=batch_BW[:, x + 1],
            next_observations_BD=batch_BW[:, x + 2 :],
        )

    def between(self, begin: int, end: int) -> np.ndarray:
        """The rows added as numbers begin, ..., end - 1 of the run, which must still be there."""
        positions = torch.arange(begin, end) % self.capacity
        return self.rows_CW[positions.to(self.rows_CW.device)].cpu().numpy()


class ReplayFiles:
    """The files of one run's replay buffer. Written by the run's driver alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.segments: list[dict[str, Any]] = []  # begin, end, sha256 of each file, oldest first
        self.saves: list[int] = []  # transitions added at each of the last saves

    def save(self, buffer: ReplayBuffer) -> dict[str, Any]:
        """Write what was added since the last save; return what the checkpoint has to hold.

        Raises UserError if the disk refuses; the earlier files stay as they were.
        """
        begin = max(self.segments[-1]["end"] if self.segments else 0, buffer.added - buffer.capacity)
        if begin < buffer.added:
            contents = safetensors.numpy.save({ROWS: buffer.between(begin, buffer.added)})
            self._write(_name(begin, buffer.added), contents)
            digest = hashlib.sha256(contents).hexdigest()
            self.segments.append({"begin": begin, "end": buffer.added, "sha256": digest})
        self.saves = [*self.saves, buffer.added][-SAVES_KEPT:]
        oldest_needed = self.saves[0] - buffer.capacity
        for segment in [s for s in self.segments if s["end"] <= oldest_needed]:
            (self.directory / _name(segment["begin"], segment["end"])).unlink(missing_ok=True)
            self.segments.remove(segment)
        return {"added": buffer.added, "segments": [dict(s) for s in self.segments], "saves": list(self.saves)}

    def restore(self, buffer: ReplayBuffer, state: dict[str, Any]) -> None:
        """Fill an empty buffer as it was at the checkpoint whose `save` returned `state`.

        Files that were written after it are removed: the run writes them anew. Raises UserError for a file that is
        missing or damaged, and for rows of another width.
        """
        self.segments, self.saves = [dict(s) for s in state["segments"]], list(state["saves"])
        known = {_name(s["begin"], s["end"]) for s in self.segments}
        for path in self.directory.glob("*rows-*"):
            if path.name not in known:
                path.unlink()
        oldest_needed = state["added"] - buffer.capacity
        for segment in self.segments:
            if segment["end"] <= oldest_needed:
                continue
            rows_KW = self._read(segment)
            if rows_KW.shape[1] != buffer.rows_CW.shape[1]:
                raise UserError(
                    f"the replay buffer in {self.directory} is of another environment: its rows have "
                    f"{rows_KW.shape[1]} numbers instead of {buffer.rows_CW.shape[1]}"
                )
            buffer.added = segment["begin"]
            buffer.add(rows_KW)

    def _write(self, name: str, contents: bytes) -> None:
        draft = self.directory / f".{name}"
        try:
            self.directory.mkdir(exist_ok=True)
            with draft.open("wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.directory / name)
            folder = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise UserError(
                f"cannot save the replay buffer in {self.directory}: {error.strerror}; the last checkpoint is good"
            ) from error

    def _read(self, segment: dict[str, Any]) -> np.ndarray:
        path = self.directory / _name(segment["begin"], segment["end"])
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"the replay buffer's file {path} is missing: the run cannot go on exactly") from None
        if hashlib.sha256(contents).hexdigest() != segment["sha256"]:
            raise UserError(f"the replay buffer's file {path} is damaged: it differs from its checksum")
        return safetensors.numpy.load(contents)[ROWS]


def _name(begin: int, end: int) -> str:
    return f"rows-{begin:012d}-{end:012d}.safetensors"
