"""What a person watching the terminal sees: one line a step, a progress bar below the lines, tables."""

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SHOWN = 6  # metrics on a line; the others are in the files


class _Stdout:
    """Standard output until nobody reads it any more: a pipe or terminal that closes does not end a run."""

    def __init__(self) -> None:
        self._stream = sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._try(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # takes also what the interpreter still holds at the end
            os.close(nowhere)


class RunConsole:
    """Lines go to stdout, or nowhere once that is closed. The progress bar exists on a terminal only; a pipe or a log
    file gets just the lines."""

    def __init__(self, name: str, started_from: int = 0) -> None:
        self._console = Console(file=cast(IO[str], _Stdout()), highlight=False, emoji=False)
        self._name, self._started_from = name, started_from
        self._progress: Progress | None = None
        self._previous = time.monotonic()

    def print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float], total: int | None) -> None:
        """Show the first few metrics (a trainer names the most telling ones first) and the time since the last line."""
        now = time.monotonic()
        figures = [f"{name.partition('/')[2] or name} {value:.4g}" for name, value in list(metrics.items())[:SHOWN]]
        counter = f"step {step}/{total}" if total else f"step {step}"
        self.print(" | ".join([counter, *figures, f"{now - self._previous:.1f} s"]))
        self._previous = now
        if total and self._console.is_terminal:
            self._advance(step, total)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.print(title)
        self._console.print(table, markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _advance(self, step: int, total: int) -> None:
        if self._progress is None:
            columns = (TextColumn(self._name), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.add_task("", total=total, completed=self._started_from)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], total=total, completed=step)
