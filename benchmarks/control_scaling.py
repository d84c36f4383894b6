"""Environment steps a second of A2C, or off-policy actor-critic, with 1, 2, 4, ... workers, learning included.

CartPole-v1 costs a microsecond a step, HalfCheetah-v5 some fifty, and Slow-v0 sleeps for five milliseconds, as a
simulator on another machine does. Where the environment is the bottleneck, twice the workers should play twice as much,
as far as the machine lets them: processors that are all busy share caches, power and physical cores. --apart measures
as many trainings side by side that know nothing of each other, a process each: what the machine itself gives.

python -m benchmarks.control_scaling                              on a machine with 16 cores: five minutes
python -m benchmarks.control_scaling --overlap                    with workers that play while the learner learns
python -m benchmarks.control_scaling --algorithm offpac           asynchronously
python -m benchmarks.control_scaling --apart                      that, for the limit
python -m benchmarks.control_scaling --workers 1 2 --seconds 2    for a look
python -m benchmarks.control_scaling --plot-only                  the newest figures as a PNG, where matplotlib is
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import gymnasium
import numpy as np
import tyro
from gymnasium.spaces import Box, Discrete

from benchmarks.record import write_result


class Slow(gymnasium.Env):
    """5 ms a step, episodes of 200 steps; pays 1 for action 1."""

    observation_space = Box(0, 1, (4,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.random(4, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(0.005)
        self.steps += 1
        return self.np_random.random(4, np.float32), float(action), False, self.steps == 200, {}


gymnasium.register("Slow-v0", entry_point=Slow)


# Flags of a call of one worker, which plays as many steps by either algorithm: A2C's in segments, an update each.
SETTINGS = {
    "CartPole-v1": {
        "a2c": "--envs-per-worker 64 --n-steps 32 --segments 8",
        "offpac": "--envs-per-worker 64 --n-steps 256 --replays 0",
    },
    "HalfCheetah-v5": {
        "a2c": "--envs-per-worker 4 --n-steps 64 --segments 4",
        "offpac": "--envs-per-worker 4 --n-steps 256 --replays 0",
    },
    "benchmarks.control_scaling:Slow-v0": {
        "a2c": "--envs-per-worker 1 --n-steps 32 --segments 2",
        "offpac": "--envs-per-worker 1 --n-steps 64 --replays 0",
    },
}


@dataclasses.dataclass
class Config:
    algorithm: Literal["a2c", "offpac"] = "a2c"
    """a2c: all workers play, then the learner updates, in turns. offpac: nobody waits."""
    overlap: bool = False
    """Of a2c: the workers play while the learner updates."""
    workers: tuple[int, ...] = (1, 2, 4, 8, 14)
    seconds: float = 6.0
    """Measured in each run, after its start."""
    apart: bool = False
    """Instead of one run with N Ray workers, N runs of one process each: their steps a second, summed."""
    envs: tuple[str, ...] = tuple(SETTINGS)
    output: Path = Path("benchmarks/results/control_scaling.json")
    plot: Path = Path("docs/images/control_scaling.png")
    plot_only: bool = False
    """Draw each environment's newest figures, where matplotlib is."""


def main(config: Config) -> None:
    if config.plot_only:
        return plot(json.loads(config.output.read_text()), config.plot)
    found: dict[str, dict[int, float]] = {}
    waited: dict[str, dict[int, float]] = {}
    try:
        for env in config.envs:
            name = env.rpartition(":")[2]
            for workers in config.workers:
                speed, share = measure(env, workers, config)
                found.setdefault(name, {})[workers] = round(speed, 1)
                waited.setdefault(name, {})[workers] = round(share, 3)
                print(f"{name} {workers}: {speed:.1f} steps/s, waited for workers {share:.0%}", flush=True)
    finally:  # what is there when the time is up is kept
        if found:
            efficiency = {
                env: {w: round(rate / (w / min(rates)) / rates[min(rates)], 3) for w, rate in rates.items()}
                for env, rates in found.items()
            }
            ours = {"algorithm": config.algorithm, "overlap": config.overlap, "apart": config.apart}
            ours |= {"env_steps_per_s": found, "efficiency": efficiency, "waited_for_workers": waited}
            write_result(config.output, "control_scaling", ours)


def measure(env: str, workers: int, config: Config) -> tuple[float, float]:
    """While all runs train: their steps a second, summed, and the share of its time that a learner waited."""
    place = ["--backend", "local", "--workers", "1"] if config.apart else ["--workers", str(workers)]
    command = [sys.executable, "-m", "launch", "train", config.algorithm, "--env", env, *place]
    command += [*SETTINGS[env][config.algorithm].split(), *["--overlap"] * config.overlap]
    command += ["--steps", str(10**9), "--eval-every", str(10**9), "--log-every", "1", "--eval-episodes", "1"]
    runs_dir = Path(tempfile.mkdtemp(prefix="scaling-"))
    names = [f"run-{i}" for i in range(workers if config.apart else 1)]
    processes = []
    for seed, name in enumerate(names):
        with (runs_dir / f"{name}.console").open("w") as console:
            flags = ["--runs-dir", str(runs_dir), "--name", name, "--seed", str(seed)]
            processes.append(subprocess.Popen([*command, *flags], stdout=console, stderr=console))
    try:
        rows = [runs_dir / name / "metrics.jsonl" for name in names]
        deadline = time.monotonic() + 150  # Ray tries to start three times
        # Two lines: the first call of all includes what happens once.
        while min(len(entries(path)) for path in rows) < 2 and time.monotonic() < deadline:
            if any(process.poll() is not None for process in processes):
                raise SystemExit(f"a run ended: see {runs_dir}")
            time.sleep(0.05)
        began = time.time()
        time.sleep(config.seconds)
        ended = time.time()
        found = [[e for e in entries(path) if began <= e["time"] <= ended] for path in rows]
        if min(map(len, found)) < 2:
            raise SystemExit(f"a run made no progress: see {runs_dir}")
        speed = sum((e[-1]["step"] - e[0]["step"]) / (e[-1]["time"] - e[0]["time"]) for e in found)
        return speed, mean(line["time/waited_for_workers"] for e in found for line in e)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def entries(metrics: Path) -> list[dict[str, float]]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    newest: dict[str, dict[str, float]] = {}
    for ours in (entry["ours"] for entry in entries if entry["benchmark"] == "control_scaling"):
        if ours["algorithm"] == "a2c" and not ours.get("apart") and not ours.get("overlap"):
            newest |= ours["env_steps_per_s"]
    for env, rates in newest.items():
        workers = [int(w) for w in rates]
        base = rates[str(min(workers))] / min(workers)
        axes.plot(workers, [rate / base for rate in rates.values()], "o-", label=env)
        axes.plot(workers, workers, "k:")
    axes.set(xlabel="workers", ylabel="steps/s, of those of one worker", title=entries[-1]["machine"].partition(",")[0])
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Config))
