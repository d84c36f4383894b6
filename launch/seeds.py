"""One job under several seeds: `longstride train JOB --seeds 5`.

    runs/<name>/recipe.yaml  seed-0/ ... seed-4/ (run directories)  seed-0.log ...  aggregate.json  curves.png

Each seed is a run of its own in a process of its own. The same command again goes on where the last one was stopped:
finished seeds stay, unfinished ones resume.
"""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from agents.statistics import bootstrap_interval, interquartile_mean
from launch.console import RunConsole
from launch.disk import refusals_explained, write_atomically
from launch.execution import interruptible
from launch.exit_codes import INTERRUPTED, USER_ERROR
from launch.run_directory import RunDirectory, folder_to_fill
from launch.settings_change import refuse_changes

SUMMARIZED = ("eval/", "heldout/")  # metrics that say how good a run's policy is
NOT_AGGREGATED = ("_std", "_low", "_high")  # spread within a run
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def train_seeds(
    job: str, entries: Mapping[str, Any], defaults: Mapping[str, Any], name: str, seeds: range, at_once: int
) -> int:
    """Train every seed, print and write the aggregate; return the exit code.

    entries: the job's configuration, as `config.yaml` of a run holds it. Raises UserError if `name` was trained with
    another one, or is something else.
    """
    own = {"job", "name", "runs_dir", "seed"}
    recipe = {"job": job} | {k: v for k, v in entries.items() if k not in own}
    folder = folder_to_fill(Path(entries["runs_dir"]), name, "recipe.yaml")
    with refusals_explained(folder, "create the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "recipe.yaml").exists():
            refuse_changes(folder / "recipe.yaml", recipe, defaults, "runs")
        write_atomically(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    console = RunConsole(name)
    try:
        with interruptible():
            codes = _train_all(job, folder, seeds, at_once, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from here")
        return INTERRUPTED
    if set(codes) == {USER_ERROR} and not any(folder.glob("seed-*/config.yaml")):
        _discard(folder)
    summaries = {seed: RunDirectory(folder / f"seed-{seed}").read_summary() for seed in seeds}
    finished = {seed: s["metrics"] for seed, s in summaries.items() if s.get("status") == "finished"}
    if finished:
        report(job, folder, finished, [seed for seed in seeds if seed not in finished], console)
    return max(codes, default=0)


def _discard(folder: Path) -> None:
    """Remove what was written for seeds that were all refused: the name is free for the corrected command."""
    for path in (folder / "recipe.yaml", *folder.glob("seed-*.log")):
        path.unlink()
    with contextlib.suppress(OSError):  # the user's own files stay
        folder.rmdir()


def _train_all(job: str, folder: Path, seeds: range, at_once: int, console: RunConsole) -> list[int]:
    """Return the exit codes; of a process that a signal ended, as a shell has it: 128 + its number."""
    waiting, running, codes = list(seeds), dict[int, subprocess.Popen[bytes]](), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                seed = waiting.pop(0)
                if (command := _command(job, folder, seed)) is not None:
                    with (folder / f"seed-{seed}.log").open("ab") as log:
                        running[seed] = _start(command, log)
            time.sleep(0.1)
            for seed, process in list(running.items()):
                if process.poll() is not None:
                    del running[seed]
                    code = process.returncode
                    codes.append(code if code >= 0 else 128 - code)
                    console.print(f"seed {seed}: {_outcome(folder, seed, code)}")
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)  # each run ends in order
        for process in running.values():
            process.wait()
    return codes


def _start(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own, where Ctrl-C does not reach it: with our SIGTERM that would be the second signal, which
    ends a run at once. It gets SIGTERM from the kernel too when this process is killed."""

    def end_with_parent() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
    )


def _command(job: str, folder: Path, seed: int) -> list[str] | None:
    """None if the seed is finished."""
    launch, where = [sys.executable, "-m", "launch"], ["--runs-dir", str(folder)]
    directory = RunDirectory(folder / f"seed-{seed}")
    if not directory.config.exists():
        flags = ["--recipe", str(folder / "recipe.yaml"), "--name", f"seed-{seed}", "--seed", str(seed)]
        return [*launch, "train", job, *flags, *where]
    if directory.read_summary().get("status") == "finished":
        return None
    return [*launch, "resume", f"seed-{seed}", *where]


def _outcome(folder: Path, seed: int, code: int) -> str:
    if code == 0:
        metrics = RunDirectory(folder / f"seed-{seed}").read_summary()["metrics"]
        return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items() if _aggregated(name)) or "finished"
    lines = (folder / f"seed-{seed}.log").read_text(errors="replace").splitlines()
    said = lines[-1] if lines else "it said nothing"
    if code < 0:  # killed for its memory, say: its last line knows nothing of it
        return f"ended by {signal.Signals(-code).name}; its last line: {said}"
    return f"failed with exit code {code}: {said}"


def _aggregated(metric: str) -> bool:
    return metric.startswith(SUMMARIZED) and not metric.endswith(NOT_AGGREGATED)


def report(
    job: str, folder: Path, finished: Mapping[int, Mapping[str, float]], missing: list[int], console: RunConsole
) -> None:
    """Print the table, and write aggregate.json and curves.png. finished: metrics of each seed; missing: the others."""
    names = [name for name in next(iter(finished.values())) if _aggregated(name)]
    names = [name for name in names if all(name in metrics for metrics in finished.values())]
    figures = {name: aggregate(np.array([metrics[name] for metrics in finished.values()])) for name in names}
    rows = [
        [name, *(f"{f[what]:.5g} [{f[f'{what}_ci95'][0]:.5g}, {f[f'{what}_ci95'][1]:.5g}]" for what in ("mean", "iqm"))]
        for name, f in figures.items()
    ]
    title = f"{folder.name}: {len(finished)} seeds" + (f", without {', '.join(map(str, missing))}" if missing else "")
    console.table(title, ["metric", "mean [95%]", "interquartile mean [95%]"], rows)
    path = folder / "aggregate.json"
    with refusals_explained(path, "write"):
        content = {"job": job, "seeds": list(finished), "missing": missing, "metrics": figures}
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    console.print(str(path))
    for name in names[:1]:
        draw_curves(folder, list(finished), name, console)


def aggregate(values: np.ndarray) -> dict[str, Any]:
    """Of one metric's values (S,) over the seeds."""
    return {
        "mean": float(values.mean()),
        "mean_ci95": bootstrap_interval(values),
        "iqm": float(interquartile_mean(values)),
        "iqm_ci95": bootstrap_interval(values, interquartile_mean),
        "values": values.tolist(),
    }


def draw_curves(folder: Path, seeds: list[int], metric: str, console: RunConsole) -> None:
    """curves.png: the metric by steps, each seed and their interquartile mean with its 95% interval."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no curves.png: it needs matplotlib, pip install 'longstride[plots]'")
        return
    curves = [curve for seed in seeds if len(curve := _curve(folder / f"seed-{seed}" / "metrics.jsonl", metric))]
    if not curves:
        return
    shortest = min(map(len, curves))
    steps_SK, values_SK = np.moveaxis(np.array([curve[:shortest] for curve in curves]), -1, 0)
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    axes.plot(steps_SK.T, values_SK.T, color="tab:blue", alpha=0.3, linewidth=1)
    middle = steps_SK.mean(0)
    axes.plot(middle, interquartile_mean(values_SK.T), color="tab:blue", label=f"interquartile mean of {len(curves)}")
    intervals = np.array([bootstrap_interval(values, interquartile_mean) for values in values_SK.T])
    axes.fill_between(middle, *intervals.T, color="tab:blue", alpha=0.15, label="95% interval")
    axes.set(xlabel="steps", ylabel=metric, title=folder.name)
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    console.print(str(folder / "curves.png"))


def _curve(path: Path, metric: str) -> list[tuple[int, float]]:
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a last line that a kill cut short
            rows.append(json.loads(line))
    return [(row["step"], row[metric]) for row in rows if metric in row]
