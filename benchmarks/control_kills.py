"""Kill -9 the workers and drivers of control agents at random moments, and check that nothing was lost.

Each agent first runs undisturbed with a few seeds. Then it runs with the same seeds again and is killed again and
again, each dead driver followed by `longstride resume`. At the end

* every run has finished all its steps, with one line of metrics after another and no step twice;
* a run whose driver alone was killed equals the undisturbed one bit for bit (networks, optimizers, replay, counters);
* a run that lost workers, whose episodes in play are then begun anew, scores within the spread of the seeds.

python -m benchmarks.control_kills --kills 50
"""

import dataclasses
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.random_kills import Victim, steady
from benchmarks.record import write_result

FLAGS = {
    "qac": "--env CartPole-v1 --workers 1 --steps 150000 --eval-every 10000",
    "a2c": "--env CartPole-v1 --workers 1 --steps 150000 --eval-every 10000",
    "trpo": "--env CartPole-v1 --workers 1 --steps 80000 --eval-every 8000",
    "offpac": "--env CartPole-v1 --workers 1 --steps 100000 --eval-every 10000",
    "ddpg": "--env Pendulum-v1 --workers 1 --steps 8000 --eval-every 1000 --learning-starts 1000 --gamma 0.95"
    " --tau 0.02 --hidden 64 64 --batch-size 64 --learner-threads 1 --log-every 500",
}
SLACK = 0.1  # of the score, beyond the worst of the seeds: a spread of three runs is a small sample


@dataclasses.dataclass
class Config:
    kills: int = 50
    agents: tuple[str, ...] = tuple(FLAGS)
    seeds: int = 3
    longest_wait_s: float = 8.0
    """A kill comes after a random time up to this."""
    seed: int = 0
    output: Path = Path("benchmarks/results/control_kills.json")


def main(config: Config) -> None:
    rng = random.Random(config.seed)
    runs_dir = Path(tempfile.mkdtemp(prefix="control-kills-"))
    report: dict[str, dict] = {}
    for number, agent in enumerate(config.agents):
        share = config.kills // len(config.agents) + (number < config.kills % len(config.agents))
        report[agent] = besiege(agent, share, config, runs_dir, rng)
        print(agent, json.dumps(report[agent]), flush=True)
    problems = [f"{agent}: {text}" for agent, entry in report.items() for text in entry["problems"]]
    write_result(config.output, "control_kills", {"kills": config.kills, "agents": report})
    print(f"{config.output}; runs in {runs_dir}")
    if problems:
        raise SystemExit("\n".join(problems))


def besiege(agent: str, kills: int, config: Config, runs_dir: Path, rng: random.Random) -> dict:
    flags = {seed: [*FLAGS[agent].split(), "--seed", str(seed)] for seed in range(config.seeds)}
    references = {}
    for seed in flags:
        references[seed] = Victim(f"{agent}-reference-{seed}", runs_dir, agent, flags[seed])
        if references[seed].process.wait():
            raise SystemExit(f"an undisturbed run failed: see {runs_dir}/{agent}-reference-{seed}.console")
    scores = [score(reference.directory) for reference in references.values()]

    killed, problems, rounds = {"driver": 0, "worker": 0}, [], []
    while sum(killed.values()) < kills:
        seed = len(rounds) % config.seeds
        victim = Victim(f"{agent}-victim-{len(rounds)}", runs_dir, agent, flags[seed])
        workers_lost, code = kill_until_done(victim, killed, kills, config.longest_wait_s, rng)
        if code:
            problems.append(f"{victim.directory.name} ended with exit code {code}")
            rounds.append({"seed": seed})
            continue
        exact = same_run(references[seed].directory, victim.directory)
        if not exact and not workers_lost:
            problems.append(f"{victim.directory.name} lost no worker and differs from the undisturbed run")
        final = score(victim.directory)
        worst = min(scores) - SLACK * max(abs(value) for value in scores)
        if final < worst:
            problems.append(f"{victim.directory.name} scores {final:.1f}, below {worst:.1f}")
        problems += lost_steps(victim.directory)
        rounds.append({"seed": seed, "workers_lost": workers_lost, "bit_for_bit": exact, "score": round(final, 1)})
    return {
        "killed": killed,
        "undisturbed_scores": [round(value, 1) for value in scores],
        "undisturbed_median": round(statistics.median(scores), 1),
        "rounds": rounds,
        "problems": problems,
    }


def kill_until_done(
    victim: Victim, killed: dict[str, int], kills: int, longest_wait_s: float, rng: random.Random
) -> tuple[int, int]:
    """Returns the number of workers killed, and the exit code: 0 too if a kill met a driver that had done all."""
    workers_lost = 0
    while True:
        wait = rng.uniform(0.5, longest_wait_s) if sum(killed.values()) < kills else None
        try:
            victim.process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            target = rng.choice(["driver", "worker"])
            if target == "driver":
                victim.kill_driver()
                killed[target] += 1
            elif kill_worker(victim):
                workers_lost += 1
                killed[target] += 1
        if (code := victim.process.poll()) is not None:
            return workers_lost, 0 if victim.finished() else code


def kill_worker(victim: Victim) -> bool:
    """Waits until it has started. False if the run ended before that."""
    while victim.process.poll() is None:
        if victim.kill_rollout():
            return True
        time.sleep(0.2)
    return False


def score(run: Path) -> float:
    return json.loads((run / "summary.json").read_text())["metrics"]["eval/return_mean"]


def same_run(one: Path, other: Path) -> bool:
    last = [max(run.glob("checkpoints/step-*")) for run in (one, other)]
    names = [sorted(file.name for file in folder.iterdir() if file.name != "manifest.json") for folder in last]
    if last[0].name != last[1].name or names[0] != names[1]:
        return False
    if any((last[0] / name).read_bytes() != (last[1] / name).read_bytes() for name in names[0]):
        return False
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, other)]
    return [steady(line) for line in lines[0]] == [steady(line) for line in lines[1]]


def lost_steps(run: Path) -> list[str]:
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((run / "summary.json").read_text())["status"]
    wrong = [] if status == "finished" else [f"{run.name} is {status}"]
    return wrong + ([] if steps == sorted(set(steps)) else [f"{run.name} logged a step twice or out of order"])


if __name__ == "__main__":
    main(tyro.cli(Config))
