"""A run's figures on disk: metrics.jsonl for programs, tb/ for TensorBoard."""

import json
import time
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from launch.disk import refusals_explained, write_atomically
from launch.run_directory import RunDirectory


class MetricsFiles:
    """Appends to a run's metric files; `started_from` is the step of the checkpoint the run continues from.

    What an interrupted session recorded after that step is dropped, so that no step is recorded twice.
    """

    def __init__(self, directory: RunDirectory, started_from: int) -> None:
        self._path = directory.metrics
        with refusals_explained(directory.root, "write metrics in"):
            _rewind(directory, started_from)
            self._lines = self._path.open("a", buffering=1)
            # purge_step tells TensorBoard to forget what earlier event files say of these steps.
            self._tensorboard = SummaryWriter(str(directory.tensorboard), purge_step=started_from + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with refusals_explained(self._path, "write"):
            self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        self._lines.close()
        self._tensorboard.close()


def _rewind(directory: RunDirectory, last_step: int) -> None:
    """Drop the lines of steps after `last_step`, and a last line that a crash cut short."""
    if not directory.metrics.exists():
        return
    kept = []
    for line in directory.metrics.read_text().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
        if step <= last_step and line.endswith("\n"):
            kept.append(line)
    write_atomically(directory.metrics, "".join(kept))
