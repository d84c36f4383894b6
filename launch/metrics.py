"""A run's figures on disk: metrics.jsonl for programs, tb/ for TensorBoard."""

import json
import time
from collections.abc import Mapping

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from launch.checkpoint import Checkpoint
from launch.disk import refusals_explained, write_atomically
from launch.run_directory import RunDirectory


class MetricsFiles:
    """Appends to a run's metric files.

    checkpoint: what the run continues from. Lines that an interrupted session wrote after it are dropped, so that
    nothing is recorded twice; counting lines, since a step may have several and not all of them before the checkpoint.
    """

    def __init__(self, directory: RunDirectory, checkpoint: Checkpoint | None) -> None:
        self._path = directory.metrics
        self.lines = checkpoint.metric_lines if checkpoint else 0
        with refusals_explained(directory.root, "write metrics in"):
            _rewind(directory, self.lines)
            self._file = self._path.open("a", buffering=1)
            # purge_step tells TensorBoard to forget what earlier event files say of these steps.
            purge_step = checkpoint.step + 1 if checkpoint else 0
            self._tensorboard = SummaryWriter(str(directory.tensorboard), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with refusals_explained(self._path, "write"):
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            self.lines += 1
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: (H, W, 3) uint8, to TensorBoard only."""
        self._tensorboard.add_image(name, picture, step, dataformats="HWC")
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def _rewind(directory: RunDirectory, lines: int) -> None:
    """Keep the first lines only."""
    if directory.metrics.exists():
        written = directory.metrics.read_text().splitlines(keepends=True)
        write_atomically(directory.metrics, "".join(written[:lines]))
