"""longstride's control agents beside Stable-Baselines3's: scores, speed, and time to a threshold.

    python -m benchmarks.control_peer --algo trpo --env HalfCheetah-v5 --steps 1000000 --seeds 5
    python -m benchmarks.control_peer --algo a2c --env CartPole-v1 --steps 500000 --seeds 5 --jobs 8   # on many cores
    python -m benchmarks.control_peer --table     # the newest entry of each pair and length as Markdown

Ours runs as a user runs it, from the recipe that comes with longstride (`a2c-cartpole`), and with the policy and the
environments in one process unless --backend and --workers say otherwise, as the peer does. Seeds of both sides are
interleaved, so that whatever else the machine does falls on both; each process has one thread unless --peer-threads
gives the peer more. One entry for each (algo, env): the median over the seeds of the mean return of 20 deterministic
episodes after the last step, training steps per second, and seconds from the start of the process until the mean return
of the last 100 training episodes reaches a threshold. An entry is written after each run, so an interrupted benchmark
keeps what it has; with --go-on the same command adds what the newest entry of its kind lacks (ours anew if the recipe
has changed). Where the peer would take days, scores alone can be compared:

    python -m benchmarks.control_peer --algo ddpg --env Hopper-v5 --steps 300000 --device cuda --peer-device cpu \
        --sides ours          # on a GPU; then --sides peer --go-on wherever there are cores, a few seeds at a time

or `--peer-device cuda --peer-recorded`, which gives the peer's gradient steps to the GPU as a CUDA graph.
"""

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro

from benchmarks.record import describe_machine, write_result
from benchmarks.training_run import last_evaluation, quietly, side_by_side
from launch.config import read_recipe

THRESHOLDS = {
    "CartPole-v1": 475,
    "Acrobot-v1": -100,
    "Pendulum-v1": -250,
    "MountainCarContinuous-v0": 90,
    "LunarLander-v3": 100,
    "LunarLanderContinuous-v3": 100,
    "HalfCheetah-v5": 1500,
    "Hopper-v5": 1000,
    "Walker2d-v5": 1000,
    "Swimmer-v5": 30,
    "Reacher-v5": -10,
    "Ant-v5": 1000,
}


@dataclasses.dataclass
class Config:
    algo: str = "a2c"
    env: str = "CartPole-v1"
    recipe: str | None = None
    """Ours, where it is not the one that its name gives to the algorithm and the environment."""
    steps: int = 500_000
    seeds: int = 5
    jobs: int = 1
    """Runs at a time."""
    backend: Literal["local", "ray"] = "local"
    workers: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides learn."""
    peer_device: Literal["cpu", "cuda"] | None = None
    """Where the peer learns, if elsewhere: such an entry compares scores, and has no ratios of time."""
    peer_threads: int = 1
    peer_recorded: bool = False
    """DDPG's peer with its gradient step as a CUDA graph (benchmarks/sb3_recorded.py): for scores, not for speeds."""
    long_evaluation: int = 0
    """So many episodes more after the last step, whose mean return is kept beside that of the 20."""
    sides: tuple[Literal["ours", "peer"], ...] = ("ours", "peer")
    go_on: bool = False
    """Keep the runs of the newest entry of this algo, env and steps, and add the missing ones."""
    table: bool = False
    output: Path = Path("benchmarks/results/control_peer.json")


def recipe_name(config: Config) -> str:
    return config.recipe or f"{config.algo}-{config.env.partition('-')[0].lower()}"


def recipe(config: Config) -> dict[str, Any]:
    return read_recipe(recipe_name(config), None)


def ours(config: Config, seed: int) -> dict[str, Any]:
    runs_dir, name = Path(tempfile.mkdtemp(prefix="control-")), f"seed-{seed}"
    flags = {
        "recipe": recipe_name(config),
        "env": config.env,
        "steps": config.steps,
        "seed": seed,
        "backend": config.backend,
        "workers": config.workers,
        "device": config.device,
        "eval-every": config.steps,
        "eval-episodes": 20,
        "log-every": max(1000, config.steps // 500),  # the peer looks at every step
        "runs-dir": runs_dir,
        "name": name,
    }
    command = [sys.executable, "-m", "launch", "train", config.algo]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    began = time.time()
    quietly(command, {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text().splitlines()]
    threshold = THRESHOLDS[config.env]
    reached = next((row for row in rows if row.get("train/return_mean", -1e9) >= threshold), None)
    seconds = before = 0.0
    for row in rows:
        seconds += (row["step"] - before) / row["time/env_steps_per_s"]
        before = row["step"]
    longer = {}
    if config.long_evaluation:
        command = [sys.executable, "-m", "launch", "evaluate", str(runs_dir / name)]
        quietly([*command, "--eval-episodes", str(config.long_evaluation)], {"OMP_NUM_THREADS": "1"})
        mean = round(last_evaluation(runs_dir / name)["eval/return_mean"], 3)
        longer = {"long_evaluation": {"episodes": config.long_evaluation, "return_mean": mean}}
    return {
        "seed": seed,
        "steps": rows[-1]["step"],
        "return_mean": round(rows[-1]["eval/return_mean"], 2),
        "steps_per_s": round(rows[-1]["step"] / seconds, 1),
        "steps_to_threshold": reached["step"] if reached else None,
        "seconds_to_threshold": round(reached["time"] - began, 2) if reached else None,
        **longer,
    }


def peer(config: Config, seed: int) -> dict[str, Any]:
    flags = {"algo": config.algo, "env": config.env, "steps": config.steps, "seed": seed}
    flags |= {"device": config.peer_device or config.device, "threads": config.peer_threads}
    command = [sys.executable, "-m", "benchmarks.sb3_peer", "--threshold", str(THRESHOLDS[config.env])]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    command += ["--recorded"] * config.peer_recorded
    command += ["--long-evaluation", str(config.long_evaluation)] * bool(config.long_evaluation)
    lines = quietly(command, {"OMP_NUM_THREADS": str(config.peer_threads)}).splitlines()
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = [run["seconds_to_threshold"] for run in runs]
    return {
        "median_return": median(run["return_mean"] for run in runs),
        "median_steps_per_s": median(run["steps_per_s"] for run in runs),
        # A seed that never got there counts as infinitely slow.
        "median_seconds_to_threshold": t if (t := median(s if s is not None else 1e9 for s in times)) < 1e9 else None,
        "runs": sorted(runs, key=lambda run: run["seed"]),
    }


def entry(config: Config, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    head = {"algo": config.algo, "env": config.env, "threshold": THRESHOLDS[config.env]}
    head |= {"steps": config.steps, "backend": config.backend, "workers": config.workers, "device": config.device}
    head |= {"peer_device": config.peer_device, "runs_at_a_time": config.jobs}
    head |= {"recipe_name": config.recipe, "recipe": recipe(config)}
    sides = {side: summary(runs) if runs else {} for side, runs in found.items()}
    ratio = {}
    if sides["ours"] and sides["peer"] and not config.peer_device and not config.peer_recorded:
        ratio["steps_per_s"] = round(sides["ours"]["median_steps_per_s"] / sides["peer"]["median_steps_per_s"], 2)
        slow, fast = (sides[side]["median_seconds_to_threshold"] for side in ("ours", "peer"))
        ratio["seconds_to_threshold"] = round(slow / fast, 2) if slow and fast else None
    return {"ours": head | sides["ours"], "peer": sides["peer"], "ratio": ratio}


def print_table(path: Path) -> None:
    entries = [(e["ours"], e) for e in json.loads(path.read_text()) if e["ours"].get("runs")]
    newest = {(label(h), f"{h['runs'][0]['steps']:.1e}"): e for h, e in entries}
    print("| | steps | median return, ours | SB3 | steps/s, ours | SB3 | ratio | threshold | s to it, ours | SB3 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (what, steps), e in sorted(newest.items()):
        sides = [e["ours"], e["peer"]]
        returns, rates, seconds = (
            [f"{side[key]:.{digits}f}" if side.get(key) is not None else "–" for side in sides]
            for key, digits in (("median_return", 1), ("median_steps_per_s", 0), ("median_seconds_to_threshold", 1))
        )
        cells = [what, f"{float(steps):,.0f}", *returns, *rates]
        print(
            "|",
            " | ".join([*cells, str(e["ratio"].get("steps_per_s", "–")), str(e["ours"]["threshold"]), *seconds]),
            "|",
        )


def label(head: dict[str, Any]) -> str:
    where = " on a GPU" if head.get("device") == "cuda" else ""
    return f"{head['algo']} {head['env']}{where}" + (f" by {head['recipe_name']}" if head.get("recipe_name") else "")


def main(config: Config) -> None:
    if config.table:
        return print_table(config.output)
    entries = json.loads(config.output.read_text()) if config.output.exists() else []
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    begun = next((e for e in reversed(entries) if config.go_on and is_same(e["ours"], config)), None)
    if begun:
        entries.remove(begun)
        found = {side: begun[side].get("runs", []) for side in found}
        if begun["ours"].get("recipe", recipe(config)) != recipe(config):
            found["ours"] = []  # by hyperparameters of then
    sides = [side for side in (ours, peer) if side.__name__ in config.sides]
    done = {(run["seed"], side) for side, runs in found.items() for run in runs}
    pairs = [(s, side) for s, side in itertools.product(range(config.seeds), sides) if (s, side.__name__) not in done]
    for number, run in side_by_side([partial(side, config, seed) for seed, side in pairs], config.jobs):
        side = pairs[number][1].__name__
        found[side].append(run | {"machine": describe_machine()} if config.peer_device else run)
        print(side, run, flush=True)
        config.output.write_text(json.dumps(entries))
        write_result(config.output, "control_peer", **entry(config, found))
    print(json.dumps(entry(config, found)["ratio"]))


def is_same(head: dict[str, Any], config: Config) -> bool:
    keys = "algo", "env", "steps", "backend", "workers", "device", "peer_device"
    same_recipe = head.get("recipe_name") == config.recipe
    return same_recipe and all(head.get(key) == getattr(config, key) for key in keys)


if __name__ == "__main__":
    main(tyro.cli(Config))
