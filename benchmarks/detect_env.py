"""Detect-v0: control agents against random looking and against fixed schedules.

python -m benchmarks.detect_env --agents a2c trpo ddpg --seeds 0 1 2 --steps 100000
python -m benchmarks.detect_env --agents --eye FOLDER --episodes 8      # the baselines alone, with another detector

Agents look through the detector that comes with the package. DDPG takes DetectContinuous-v0. Returns are the final
quality of the boxes found minus 0.02 a look, over scenes that no training episode showed.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.record import write_result
from envs.vision.detect import LEVELS, STOP, DetectVectorEnv

ENVIRONMENTS = {"ddpg": "envs.vision:DetectContinuous-v0"}
QUARTERS, CLOSE_UPS = range(1, 5), range(5, STOP)


@dataclasses.dataclass
class Config:
    agents: tuple[str, ...] = ("a2c", "trpo", "ddpg")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100_000
    episodes: int = 100
    eye: Path | None = None
    output: Path = Path("benchmarks/results/detect_env.json")


def main(config: Config) -> None:
    baselines = {
        "random": returns(config, lambda looks, rng: int(rng.integers(STOP + 1))),
        "the whole, then stop": returns(config, schedule([0])),
        "four quarters": returns(config, schedule(list(QUARTERS))),
        f"all {LEVELS[-1][0] ** 2} close-ups": returns(config, schedule(list(CLOSE_UPS))),
    }
    print(json.dumps(baselines, indent=1), flush=True)
    found: dict[str, Any] = {}
    for agent in config.agents:
        found[agent] = [trained(config, agent, seed) for seed in config.seeds]
        print(agent, found[agent], flush=True)
    best = max(b["return"] for b in baselines.values())
    ratio = {agent: round(float(np.mean(values)) - best, 4) for agent, values in found.items()}
    write_result(config.output, "detect_env", found, baselines, {"above_best_baseline": ratio})


def schedule(windows: list[int]) -> Callable[[int, np.random.Generator], int]:
    return lambda looks, rng: windows[looks] if looks < len(windows) else STOP


def returns(config: Config, choose: Callable[[int, np.random.Generator], int]) -> dict[str, float]:
    """One episode in each environment of a vector; `choose(looks so far, rng)` gives the window."""
    env = DetectVectorEnv(config.episodes, eye=config.eye, max_looks=len(CLOSE_UPS))
    env.reset(seed=10_000)
    rng, totals, running = np.random.default_rng(0), np.zeros(config.episodes), np.ones(config.episodes, bool)
    while running.any():
        looks = [e.looks for e in env.episodes]
        actions = [choose(n, rng) if r else STOP for n, r in zip(looks, running)]
        _, rewards, terminated, _, _ = env.step(actions)
        totals += rewards * running
        running &= ~terminated
    return {"return": round(float(totals.mean()), 4), "std": round(float(totals.std()), 4)}


def trained(config: Config, agent: str, seed: int) -> float:
    runs_dir = Path(tempfile.mkdtemp(prefix="detect-"))
    environment = ENVIRONMENTS.get(agent, "envs.vision:Detect-v0")
    command = [sys.executable, "-m", "launch", "train", agent, "--env", environment, "--steps", str(config.steps)]
    command += ["--seed", str(seed), "--runs-dir", str(runs_dir), "--name", "run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((runs_dir / "run" / "summary.json").read_text())["metrics"]["eval/return_mean"]


if __name__ == "__main__":
    main(tyro.cli(Config))
