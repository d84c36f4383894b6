"""The quickstart over several seeds: held-out figures, wall time, and the memory of all its processes.

python -m benchmarks.quickstart --seeds 0 1 2
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tyro

from benchmarks.record import write_result

FIGURES = ("pass@1", "greedy", "mean_tokens")


@dataclasses.dataclass
class Config:
    recipe: str = "quickstart"
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = Path("benchmarks/results/quickstart.json")


def main(config: Config) -> None:
    runs_dir = Path(tempfile.mkdtemp(prefix="quickstart-"))
    runs = [one_seed(config.recipe, seed, runs_dir) for seed in config.seeds]
    gains = [round(run["pass@1"]["rl"] - run["pass@1"]["sft"], 4) for run in runs]
    ours = {"runs": runs, "rl_gain_in_pass@1": gains, "smallest_gain": min(gains)}
    write_result(config.output, config.recipe, ours)
    print(json.dumps(ours, indent=2))


def one_seed(recipe: str, seed: int, runs_dir: Path) -> dict[str, object]:
    name = f"seed-{seed}"
    command = [sys.executable, "-m", "launch", "train", "reason", "--recipe", recipe, "--seed", str(seed)]
    begin, peak = time.monotonic(), {"rss": 0.0, "pss": 0.0}
    with (runs_dir / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*command, "--runs-dir", str(runs_dir), "--name", name], stdout=log, stderr=log)
        while process.poll() is None:
            for kind, gib in memory(process.pid).items():
                peak[kind] = max(peak[kind], gib)
            time.sleep(5)
    if process.returncode:
        raise SystemExit(f"seed {seed} ended with exit code {process.returncode}: see {runs_dir}/{name}.log")
    metrics = json.loads((runs_dir / name / "summary.json").read_text())["metrics"]
    figures = {f: {tag: round(metrics[f"heldout/{f}/{tag}"], 4) for tag in ("base", "sft", "rl")} for f in FIGURES}
    return {
        "seed": seed,
        **figures,
        "wall_s": round(time.monotonic() - begin, 1),
        "peak_rss_gib": round(peak["rss"], 2),
        "peak_pss_gib": round(peak["pss"], 2),
        "mismatch_kl": metrics["train/mismatch_kl"],
    }


def memory(pid: int) -> dict[str, float]:
    """Resident memory of a process with all its descendants: rss counts shared pages in each, pss once."""
    total = {"rss": 0.0, "pss": 0.0}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            usage = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        total["rss"] += usage.rss / 2**30
        total["pss"] += usage.pss / 2**30
    return total


if __name__ == "__main__":
    main(tyro.cli(Config))
