"""A2C on CartPole-v1 with two Ray workers: seconds until the greedy policy's mean over 100 episodes reaches 475.

python -m benchmarks.a2c_cartpole --seeds 0 1 2
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.record import write_result

THRESHOLD = 475.0


@dataclasses.dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = Path("benchmarks/results/a2c_cartpole.json")


def main(config: Config) -> None:
    runs_dir = Path(tempfile.mkdtemp(prefix="a2c-"))
    runs = []
    for seed in config.seeds:
        name, begin = f"seed-{seed}", time.time()
        command = [sys.executable, "-m", "launch", "train", "a2c", "--env", "CartPole-v1", "--workers", "2"]
        flags = ["--seed", str(seed), "--runs-dir", str(runs_dir), "--name", name]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        wall_s = time.time() - begin
        entries = [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text().splitlines()]
        reached = [e for e in entries if e.get("eval/return_mean", 0.0) >= THRESHOLD]
        summary = json.loads((runs_dir / name / "summary.json").read_text())
        runs.append(
            {
                "seed": seed,
                "steps_to_475": reached[0]["step"] if reached else None,
                "seconds_to_475": round(reached[0]["time"] - begin, 1) if reached else None,
                "final_return_mean": summary["metrics"]["eval/return_mean"],
                "wall_s": round(wall_s, 1),
            }
        )
        print(runs[-1], flush=True)
    write_result(config.output, "a2c_cartpole", {"episodes": 100, "workers": 2, "runs": runs})


if __name__ == "__main__":
    main(tyro.cli(Config))
