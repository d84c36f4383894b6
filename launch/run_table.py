"""The table of `longstride runs`: each run, how it stands, and the figure that tells most."""

from collections.abc import Mapping
from pathlib import Path

from launch.console import RunConsole
from launch.run_directory import RunDirectory
from models.errors import UserError


def show_runs(runs_dir: Path) -> None:
    rows = []
    for directory in RunDirectory.all(runs_dir):
        name = str(directory.root.relative_to(runs_dir))
        try:
            rows.append([name, *_standing(directory)])
        except UserError as error:  # of one damaged run, which must not hide the others
            rows.append([name, "", "damaged", "", str(error)])
    RunConsole("runs").table("runs", ["run", "job", "status", "step", "metric"], rows)


def _standing(directory: RunDirectory) -> tuple[str, str, str, str]:
    summary = directory.read_summary()
    if not summary and directory.summary.exists():
        raise UserError("summary.json holds no summary")
    status = summary.get("status", "killed")
    if status == "running" and not directory.is_live():
        status = "killed"
    figure = telling_figure(summary.get("metrics", {}))
    return str(directory.read_config()["job"]), status, str(summary.get("steps", 0)), figure


def telling_figure(metrics: Mapping[str, float]) -> str:
    """First `eval/<figure>`, else last `heldout/pass@1/<tag>` (base, sft, rl in turn), else the first of all."""
    evaluated = [name for name in metrics if name.startswith("eval/") and name.count("/") == 1]
    heldout = [name for name in metrics if name.startswith("heldout/pass@1/") and name.count("/") == 2]
    chosen = evaluated[:1] or heldout[-1:] or list(metrics)[:1]
    return "".join(f"{name} {metrics[name]:.4g}" for name in chosen)
