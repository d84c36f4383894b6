"""A trained detector tuned by the score of its answers: held-out quality and AP before and after, over seeds.

python -m benchmarks.detr_rl --model RUN/model/final --device cuda

Beside it a control with a constant reward, in which only the boxes go on learning: what is gained over it is gained by
the reward.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from benchmarks.record import write_result
from envs.vision.shipped_weights import WEIGHTS

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
    loaders: int = 2
    device: str = "cpu"
    backend: str = "ray"
    output: Path = Path("benchmarks/results/detr_rl.json")


def constant(*answer_and_truth: object) -> float:
    """The control's reward: every answer is as good as any other."""
    return 0.0


def main(config: Config) -> None:
    rewards = {"tuned": "envs.vision.box_quality:box_quality", "control": "benchmarks.detr_rl:constant"}
    found = {name: [run(config, reward, seed) for seed in config.seeds] for name, reward in rewards.items()}
    gains = {
        name: round(sum(r["eval/quality"] - r["eval/before/quality"] for r in rows) / len(rows), 4)
        for name, rows in found.items()
    }
    write_result(config.output, "detr_rl", found["tuned"], found["control"], {"quality_gained": gains})
    print(json.dumps(gains))


def run(config: Config, reward: str, seed: int) -> dict[str, float]:
    runs_dir = Path(tempfile.mkdtemp(prefix="detr-rl-"))
    command = [sys.executable, "-m", "launch", "train", "detr-rl", "--model", str(config.model), "--reward", reward]
    command += ["--seed", str(seed), "--runs-dir", str(runs_dir), "--name", "run", "--eval-every", str(config.steps)]
    for name in ("steps", "batch_size", "samples", "lr", "eval_images", "loaders", "device", "backend"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((runs_dir / "run" / "summary.json").read_text())["metrics"]
    row = {name: round(metrics[name], 4) for name in SHOWN}
    print(json.dumps({"reward": reward, "seed": seed, **row}), flush=True)
    return row


if __name__ == "__main__":
    main(tyro.cli(Config))
