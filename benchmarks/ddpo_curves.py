"""DDPO's two estimators over several seeds on one model and reward: does the reward rise, and how far?

python -m benchmarks.ddpo_curves --model runs/scenes/model/final --device cuda
python -m benchmarks.ddpo_curves --model FOLDER --reward scene-agreement --detector runs/detr/model/final --device cuda

Each run is `longstride train ddpo` in a process of its own; other flags are passed on to it (--clip-range 1.6e-3 for
latents of 16 × 16 × 4, say). The figures are rewards of held-out captions from the same
noise before and after; the curves are of the samples that were trained on. Writes what it has if it is cut short.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

RESULTS = Path(__file__).parent / "results" / "ddpo_curves.json"
UPDATES = {"is": 2, "sf": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reward", default="jpeg-compressibility")
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--estimators", nargs="+", choices=list(UPDATES), default=list(UPDATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments, flags = parser.parse_known_args()  # what is left goes to the job, as it is
    figures: dict[str, Any] = {"reward": arguments.reward, "flags": flags}
    try:
        for estimator in arguments.estimators:
            runs = []
            for seed in arguments.seeds:
                runs.append(one_run(arguments, estimator, seed, flags))
                rise = runs[-1]["after"] - runs[-1]["before"]
                print(
                    f"{estimator}, seed {seed}: {runs[-1]['before']:.4f} → {runs[-1]['after']:.4f}, {rise:+.4f}",
                    flush=True,
                )
                figures[estimator] = {
                    "runs": runs,
                    "rise_mean": statistics.mean(run["after"] - run["before"] for run in runs),
                    "rise_min": min(run["after"] - run["before"] for run in runs),
                }
    finally:
        write_result(arguments.out, "DDPO", figures)


def one_run(arguments: argparse.Namespace, estimator: str, seed: int, flags: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [
            sys.executable, "-m", "launch", "train", "ddpo", "--backend", "local", "--runs-dir", runs_dir, "--name",
            "run", "--seed", str(seed), "--device", arguments.device, "--model", str(arguments.model), "--reward",
            arguments.reward, "--estimator", estimator, "--updates", str(UPDATES[estimator]), *flags,
        ]  # fmt: skip
        if arguments.detector:
            command += ["--detector", str(arguments.detector)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(runs_dir) / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval/reward_mean"] for line in lines if "eval/reward_mean" in line]
    return {
        "seed": seed,
        "before": evaluated[0],
        "after": evaluated[-1],
        "curve": [round(line["train/reward_mean"], 5) for line in lines if "train/reward_mean" in line],
        "images_per_s": statistics.median(line["time/images_per_s"] for line in lines if "time/images_per_s" in line),
    }


if __name__ == "__main__":
    main()
