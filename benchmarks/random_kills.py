"""Kill -9 a reasoning run at random moments, its rollout actor or its driver, and check that nothing was lost.

A reference run goes undisturbed. The same run is then killed again and again, each dead driver followed by `longstride
resume`, and must end with the same policy, optimizer, sampler state and metrics, bit for bit (one rollout worker).

    python benchmarks/random_kills.py --kills 20 --engine torch
"""

import dataclasses
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.record import write_result

SMALL = shlex.split("""
  --problems 'gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=1' --count 200
  --policy.hidden-size 64 --policy.layer-types linear_attention full_attention --policy.num-experts 4
  --policy.moe-intermediate-size 64 --policy.vocab-size 320
  --sft.steps 120 --sft.count 200 --sft.batch-size 16 --rl.iterations 40 --rl.problems-per-iteration 8 --rl.samples 4
  --rl.max-tokens 24 --eval.count 10 --eval.samples 2 --save-every 2 --rollout.workers 1 --learner.threads 1
""")


@dataclasses.dataclass
class Config:
    kills: int = 20
    engine: Literal["torch", "vllm"] = "torch"
    backend: Literal["ray"] = "ray"
    seed: int = 0
    longest_wait_s: float = 20.0  # a kill comes after a random time up to this
    output: Path = Path("benchmarks/results/random_kills.json")


class Victim:
    """A run in a process of its own that is resumed whenever it was killed."""

    def __init__(self, name: str, runs_dir: Path, job: str, flags: list[str]) -> None:
        self.directory = runs_dir / name
        self.log = (runs_dir / f"{name}.console").open("ab")
        common = ["--runs-dir", str(runs_dir)]
        self.first = [sys.executable, "-m", "launch", "train", job, *flags, "--name", name, *common]
        self.again = [sys.executable, "-m", "launch", "resume", name, *common]
        self.process = self._start(self.first)

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        log = self.directory / "logs" / "rollout-0.log"
        self.logged = log.stat().st_size if log.exists() else 0  # what lies before tells of earlier processes
        return subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def kill_driver(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.finished():
            return  # everything was written, and the process was about to go
        self.resume()

    def resume(self) -> None:
        created = (self.directory / "config.yaml").exists()
        self.process = self._start(self.again if created else self.first)

    def finished(self) -> bool:
        summary = self.directory / "summary.json"
        return summary.exists() and json.loads(summary.read_text())["status"] == "finished"

    def kill_rollout(self) -> bool:
        """Kill the rollout process that the present driver started; False if there is none yet."""
        log = self.directory / "logs" / "rollout-0.log"
        pids = re.findall(r"process (\d+)$", log.read_text()[self.logged :], re.MULTILINE) if log.exists() else []
        if not pids:
            return False
        try:
            os.kill(int(pids[-1]), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def main(config: Config) -> None:
    rng = random.Random(config.seed)
    runs_dir = Path(tempfile.mkdtemp(prefix="kills-"))
    flags = [*SMALL, "--engine", config.engine]
    start = time.monotonic()
    reference = Victim("reference", runs_dir, "reason", flags)
    if reference.process.wait():
        raise SystemExit(f"the undisturbed run failed: see {runs_dir}/reference.console")
    undisturbed_s = time.monotonic() - start

    killed = {"driver": 0, "rollout": 0}
    rounds, problems, gave_up = 0, list[str](), 0
    while sum(killed.values()) < config.kills:
        rounds += 1
        victim = Victim(f"victim-{rounds}", runs_dir, "reason", flags)
        while True:
            budget = config.kills - sum(killed.values())
            wait = rng.uniform(1.0, config.longest_wait_s) if budget else None
            try:
                code = victim.process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                target = rng.choice(["driver", "rollout"])
                if target == "driver":
                    victim.kill_driver()
                elif not victim.kill_rollout():
                    continue  # it has not started yet: another moment, another draw
                killed[target] += 1
                print(killed, flush=True)
                continue
            if not victim.finished() and gave_up < config.kills // 3:
                gave_up += 1  # an actor killed three times in a row while it starts ends the run, which can go on
                victim.resume()
                continue
            if not victim.finished():
                problems.append(f"round {rounds} ended with exit code {code}")
            break
        problems += [f"round {rounds}: {text}" for text in differences(reference.directory, victim.directory)]
    ours = {
        "kills": killed,
        "rounds": rounds,
        "gave_up_and_resumed": gave_up,
        "differences": problems,
        "undisturbed_s": round(undisturbed_s, 1),
    }
    write_result(config.output, "random_kills", ours)
    print(json.dumps(ours, indent=2), f"\n{config.output}; runs in {runs_dir}")
    if problems:
        raise SystemExit(1)


def differences(reference: Path, victim: Path) -> list[str]:
    """What the killed run lost or changed; empty if nothing."""
    found = []
    for name in ("policy/final/model.safetensors",):
        if (reference / name).read_bytes() != (victim / name).read_bytes():
            found.append(f"{name} differs")
    last = [max(folder.glob("checkpoints/step-*")) for folder in (reference, victim)]
    if last[0].name != last[1].name:
        found.append(f"last checkpoints {last[0].name} and {last[1].name}")
    for file in sorted(last[0].glob("*.safetensors")):
        if file.read_bytes() != (last[1] / file.name).read_bytes():
            found.append(f"checkpoint {file.name} differs (weights, optimizer or sampler state)")
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    if states[0] != states[1]:
        found.append("checkpoint state.json differs (step, phase or sampler)")
    steps = [[steady(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (reference, victim)]
    if steps[0] != steps[1]:
        found.append("metrics.jsonl differs in something other than times")
    rollouts = [{f.name: f.read_bytes() for f in (folder / "rollouts").iterdir()} for folder in (reference, victim)]
    if rollouts[0] != rollouts[1]:
        found.append("rollouts/ differs")
    return found


def steady(line: str) -> dict[str, object]:
    """A metrics line without what may differ between equal runs: clock times and the count of restarts."""
    entry = json.loads(line)
    entry.update(entry.pop("metrics", {}))
    return {k: v for k, v in entry.items() if not k.startswith("time") and k != "run/actor_restarts"}


if __name__ == "__main__":
    main(tyro.cli(Config))
