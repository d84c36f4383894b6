"""A trained detector tuned by the score of its answers: held-out quality and AP before and after, over seeds.

python -m benchmarks.detr_rl --model RUN/model/final --device cuda --jobs 6     # six runs share a GPU

Beside it a control with a constant reward, in which only the boxes go on learning: what is gained over it is gained by
the reward.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import tyro

from benchmarks.record import write_result
from benchmarks.training_run import quietly, share_of_cores, side_by_side
from envs.vision.shipped_weights import WEIGHTS

REWARDS = {"tuned": "envs.vision.box_quality:box_quality", "control": "benchmarks.detr_rl:constant"}
SHOWN = ("eval/before/quality", "eval/quality", "eval/before/AP", "eval/AP", "eval/before/AP50", "eval/AP50")


@dataclasses.dataclass
class Config:
    model: Path = WEIGHTS / "detr-scenes"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 500
    batch_size: int = 32
    samples: int = 8
    lr: float = 1e-5
    eval_images: int = 1000
    device: str = "cpu"
    jobs: int = 1
    """Runs at a time, each in a process of its own that renders its scenes itself."""
    output: Path = Path("benchmarks/results/detr_rl.json")


def constant(*answer_and_truth: object) -> float:
    """The control's reward: every answer is as good as any other."""
    return 0.0


def main(config: Config) -> None:
    pairs = list(itertools.product(REWARDS, config.seeds))
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in REWARDS}
    gains: dict[str, float] = {}
    try:
        for number, row in side_by_side([partial(run, config, *pair) for pair in pairs], config.jobs):
            name, seed = pairs[number]
            print(json.dumps({"reward": name, "seed": seed, **row}), flush=True)
            found[name][f"seed_{seed}"] = row
            rises = [r["eval/quality"] - r["eval/before/quality"] for r in found[name].values()]
            gains[name] = round(sum(rises) / len(rises), 4)
    finally:  # also if it is cut short
        write_result(config.output, "detr_rl", found["tuned"], found["control"], {"quality_gained": gains})
    print(json.dumps(gains))


def run(config: Config, name: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="detr-rl-") as folder:
        command = [sys.executable, "-m", "launch", "train", "detr-rl", "--model", str(config.model)]
        command += ["--reward", REWARDS[name], "--seed", str(seed), "--runs-dir", folder, "--name", "run"]
        command += ["--backend", "local", "--loaders", "1", "--eval-every", str(config.steps)]
        for flag in ("steps", "batch_size", "samples", "lr", "eval_images", "device"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(config, flag))]
        quietly(command, share_of_cores(config.jobs))
        metrics = json.loads((Path(folder) / "run" / "summary.json").read_text())["metrics"]
    return {name: round(metrics[name], 4) for name in SHOWN}


if __name__ == "__main__":
    main(tyro.cli(Config))
