"""DDPG: gradient steps a second, end to end, beside Stable-Baselines3 on the same environment, network and batch size.

Both take one gradient step to one environment step; the time runs from the first gradient step to the last. The two
take turns, so that a machine that is busy for a while is so for both. SB3 runs with one torch thread and with two, and
the better of its two medians is the peer.

python -m benchmarks.ddpg_speed --env Pendulum-v1 HalfCheetah-v5
python -m benchmarks.ddpg_speed --env Pendulum-v1 HalfCheetah-v5 --matmul-precision bfloat16   # ours alone
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.record import write_result

STARTS = 1024  # steps before learning

PEER = """
import sys, time
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback

env, steps, hidden, batch_size, threads, starts = sys.argv[1], *map(eval, sys.argv[2:])
torch.set_num_threads(threads)

class Clock(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == starts:
            self.begin = time.perf_counter()
        return True

clock = Clock()
model = DDPG("MlpPolicy", env, learning_rate=1e-3, gamma=0.98, batch_size=batch_size, learning_starts=starts,
             train_freq=1, gradient_steps=1, policy_kwargs={"net_arch": list(hidden)}, device="cpu", seed=0)
model.learn(starts + steps, callback=clock)
print(steps / (time.perf_counter() - clock.begin))
"""


@dataclasses.dataclass
class Config:
    env: tuple[str, ...] = ("Pendulum-v1",)
    steps: int = 2000
    """Gradient steps to one measurement."""
    repeats: int = 3
    hidden: tuple[int, ...] = (400, 300)
    batch_size: int = 256
    matmul_precision: Literal["float32", "bfloat16"] = "float32"
    output: Path = Path("benchmarks/results/ddpg_speed.json")


def main(config: Config) -> None:
    for env in config.env:
        speeds: dict[str, list[float]] = {}
        for repeat in range(config.repeats):
            speeds.setdefault("ours", []).append(ours(env, config, repeat))
            for threads in (1, 2):
                speeds.setdefault(f"sb3, threads={threads}", []).append(sb3(env, config, threads))
            print(env, {name: [round(x, 1) for x in values] for name, values in speeds.items()}, flush=True)
        medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
        mine = medians.pop("ours")
        shape: dict[str, Any] = {"env": env, "hidden": list(config.hidden), "batch_size": config.batch_size}
        shape["matmul_precision"] = config.matmul_precision
        write_result(
            config.output,
            "ddpg_speed",
            {**shape, "gradient_steps_per_s": mine, "all": [round(x, 1) for x in speeds["ours"]]},
            {"gradient_steps_per_s": medians},
            {
                "to_best": round(mine / max(medians.values()), 2),
                "to_one_thread": round(mine / medians["sb3, threads=1"], 2),
            },
        )


def ours(env: str, config: Config, seed: int) -> float:
    runs_dir = Path(tempfile.mkdtemp(prefix="ddpg-"))
    total = STARTS + config.steps
    command = [sys.executable, "-m", "launch", "train", "ddpg", "--env", env, "--steps", str(total)]
    command += ["--gamma", "0.98", "--hidden", *map(str, config.hidden), "--batch-size", str(config.batch_size)]
    command += ["--learning-starts", str(STARTS), "--eval-every", str(total), "--eval-episodes", "1"]
    command += ["--matmul-precision", config.matmul_precision]
    command += ["--log-every", str(STARTS), "--seed", str(seed), "--runs-dir", str(runs_dir), "--name", "run"]
    run(command, threads=1)
    entries = [json.loads(line) for line in (runs_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    windows = [(b["train/gradient_steps"] - a["train/gradient_steps"], b) for a, b in itertools.pairwise(entries)]
    learning = [(steps, entry["time/gradient_steps_per_s"]) for steps, entry in windows if steps]
    return sum(steps for steps, _ in learning) / sum(steps / rate for steps, rate in learning)


def sb3(env: str, config: Config, threads: int) -> float:
    settings = [env, str(config.steps), repr(config.hidden), str(config.batch_size), str(threads), str(STARTS)]
    return float(run([sys.executable, "-c", PEER, *settings], threads).splitlines()[-1])


def run(command: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout


if __name__ == "__main__":
    main(tyro.cli(Config))
