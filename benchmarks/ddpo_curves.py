"""DDPO's two estimators over several seeds on one model and reward: does the reward rise, and how far?

python -m benchmarks.ddpo_curves --device cuda --jobs 6 --reward scene-agreement --recipe ddpo-scenes-gpu
python -m benchmarks.ddpo_curves --model FOLDER --reward scene-agreement --detector runs/detr/model/final --device cuda
python -m benchmarks.ddpo_curves --plot-only           # the newest entry of each reward as a PNG, where matplotlib is

Each run is `longstride train ddpo` in a process of its own; other flags are passed on to it (--recipe, --iterations,
say). The figures are rewards of held-out captions from the same noise before and after; the curves are of the samples
that were trained on. Writes what it has if it is cut short.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_result
from benchmarks.training_run import quietly, share_of_cores, side_by_side

RESULTS = Path(__file__).parent / "results" / "ddpo_curves.json"
PICTURE = Path("docs/images/ddpo_curves.png")
SMOOTHED = 10  # iterations
UPDATES = {"is": 2, "sf": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--reward", default="jpeg-compressibility")
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--estimators", nargs="+", choices=list(UPDATES), default=list(UPDATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PICTURE)
    parser.add_argument("--plot-only", action="store_true")
    arguments, flags = parser.parse_known_args()  # what is left goes to the job, as it is
    if arguments.plot_only:
        return plot(arguments.out, arguments.plot)
    pairs = list(itertools.product(arguments.estimators, arguments.seeds))
    figures: dict[str, Any] = {"reward": arguments.reward, "flags": flags}
    try:
        work = [partial(one_run, arguments, estimator, seed, flags) for estimator, seed in pairs]
        for number, run in side_by_side(work, arguments.jobs):
            estimator, seed = pairs[number]
            rise = run["after"] - run["before"]
            print(f"{estimator}, seed {seed}: {run['before']:.4f} → {run['after']:.4f}, {rise:+.4f}", flush=True)
            runs = [*figures.get(estimator, {}).get("runs", []), run]
            rises = [run["after"] - run["before"] for run in runs]
            figures[estimator] = {"runs": runs, "rise_mean": statistics.mean(rises), "rise_min": min(rises)}
    finally:
        write_result(arguments.out, "DDPO", figures)


def one_run(arguments: argparse.Namespace, estimator: str, seed: int, flags: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [
            sys.executable, "-m", "launch", "train", "ddpo", "--backend", "local", "--runs-dir", runs_dir, "--name",
            "run", "--seed", str(seed), "--device", arguments.device, "--reward", arguments.reward, "--estimator",
            estimator, "--updates", str(UPDATES[estimator]), *flags,
        ]  # fmt: skip
        for flag, folder in (("--model", arguments.model), ("--detector", arguments.detector)):
            command += [flag, str(folder)] if folder else []
        quietly(command, share_of_cores(arguments.jobs))
        lines = [json.loads(line) for line in (Path(runs_dir) / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/reward_mean"] for line in lines if "eval/reward_mean" in line]
    return {
        "seed": seed,
        "before": evaluated[0],
        "after": evaluated[-1],
        "curve": [round(line["train/reward_mean"], 5) for line in lines if "train/reward_mean" in line],
        "images_per_s": statistics.median(line["time/images_per_s"] for line in lines if "time/images_per_s" in line),
    }


def plot(results: Path, picture: Path) -> None:
    """Rewards of the samples that were trained on, running means, both estimators in one picture for each reward."""
    from matplotlib.figure import Figure

    newest = {entry["ours"]["reward"]: entry["ours"] for entry in json.loads(results.read_text())}
    figure = Figure(figsize=(5 * len(newest), 4), layout="constrained")
    for axes, (reward, figures) in zip(figure.subplots(1, len(newest), squeeze=False)[0], newest.items()):
        for estimator, colour in (("is", "tab:blue"), ("sf", "tab:orange")):
            for i, run in enumerate(figures.get(estimator, {}).get("runs", [])):
                label = f"DDPO-{estimator.upper()}" if i == 0 else None
                width = min(SMOOTHED, len(run["curve"]))
                means = np.convolve(run["curve"], np.full(width, 1 / width), mode="valid")
                axes.plot(range(width, width + len(means)), means, color=colour, alpha=0.7, label=label)
        axes.set(xlabel="iteration", ylabel=f"{reward}, mean of {SMOOTHED} iterations")
        axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(picture)


if __name__ == "__main__":
    main()
