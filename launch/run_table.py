"""The table of `longstride runs`: each run, how it stands, and the figure that tells most."""

from collections.abc import Mapping
from pathlib import Path

from launch.console import RunConsole
from launch.run_directory import RunDirectory


def show_runs(runs_dir: Path) -> None:
    rows = []
    for directory in RunDirectory.all(runs_dir):
        summary = directory.read_summary()
        status = summary.get("status", "killed")
        if status == "running" and not directory.is_live():
            status = "killed"
        name, job = str(directory.root.relative_to(runs_dir)), str(directory.read_config()["job"])
        rows.append([name, job, status, str(summary.get("steps", 0)), telling_figure(summary.get("metrics", {}))])
    RunConsole("runs").table("runs", ["run", "job", "status", "step", "metric"], rows)


def telling_figure(metrics: Mapping[str, float]) -> str:
    """First `eval/<figure>`, else last `heldout/pass@1/<tag>` (base, sft, rl in turn), else the first of all."""
    evaluated = [name for name in metrics if name.startswith("eval/") and name.count("/") == 1]
    heldout = [name for name in metrics if name.startswith("heldout/pass@1/") and name.count("/") == 2]
    chosen = evaluated[:1] or heldout[-1:] or list(metrics)[:1]
    return "".join(f"{name} {metrics[name]:.4g}" for name in chosen)
