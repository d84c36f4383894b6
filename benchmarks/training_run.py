"""Training runs in processes of their own, one after the other or side by side, and what is left of them."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks.record import end_in_order

Result = TypeVar("Result")
_running: set[subprocess.Popen[str]] = set()  # of `quietly`


def follow(command: Sequence[str], runs_dir: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the command, which trains `name`, and print its steps. Returns its lines of metrics and its summary.

    All that it says is kept in NAME.log. Raises SystemExit with the end of that if it fails.
    """
    with (runs_dir / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if line.startswith("step"):
                print(f"{name}: {line}", end="", flush=True)
        if process.wait():
            log.flush()
            raise SystemExit((runs_dir / f"{name}.log").read_text()[-3000:])
    entries = [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text().splitlines()]
    return entries, json.loads((runs_dir / name / "summary.json").read_text())


def last_evaluation(run: Path) -> dict[str, Any]:
    """What the latest `longstride evaluate` of the run found."""
    return json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])


def quietly(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it said. Raises SystemExit with the end of that if it fails."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(environment or {})
    )
    _running.add(process)
    try:
        said, _ = process.communicate()
    finally:
        _running.discard(process)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}:\n{said[-3000:]}")
    return said


def side_by_side(work: Sequence[Callable[[], Result]], at_once: int) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of each piece of work as it is done, `at_once` of them at a time.

    Each is a thread that waits for the processes that it starts by `quietly`. When one fails, or this process is ended
    by Ctrl-C or SIGTERM, the processes of the others are ended too.
    """
    end_in_order()
    threads = ThreadPoolExecutor(at_once)
    numbers = {threads.submit(piece): number for number, piece in enumerate(work)}
    try:
        for done in as_completed(numbers):
            yield numbers[done], done.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            process.terminate()


def share_of_cores(at_once: int) -> dict[str, str]:
    """Environment variables for one of `at_once` processes, so that they do not all take all cores."""
    return {"OMP_NUM_THREADS": str(max(1, (psutil.cpu_count() or 1) // at_once))}


@contextmanager
def folder_or_archive(path: Path) -> Iterator[Path]:
    """A folder to write to: `path` itself, or, if that ends in .tar, one whose files become that archive."""
    if path.suffix != ".tar":
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / path.stem
        inside.mkdir()
        yield inside
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.make_archive(str(path.with_suffix("")), "tar", folder, path.stem)
