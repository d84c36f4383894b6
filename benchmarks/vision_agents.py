"""Detect-v0 and Denoise-v0: control agents beside random actions and the best fixed schedule, on held-out scenes.

python -m benchmarks.vision_agents --device cuda --jobs 9           # with the models of the package; nine share a GPU
python -m benchmarks.vision_agents --toy --detector FOLDER --diffusion FOLDER  # to see that it runs, on a CPU

Each agent is trained by its recipe (a2c-detect.yaml, ...) for each seed, and its last policy evaluated by `longstride
evaluate` on scenes of the held-out split. The fixed schedules are compared on training scenes; the best of them, and
random actions, are then played on held-out ones; on Detect-v0 also a rule written by hand, which sees what agents see.
Results are written after every agent.
"""

import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import tyro

from benchmarks.record import write_result
from benchmarks.training_run import last_evaluation, quietly, share_of_cores, side_by_side
from envs.vision.denoise import ACTIONS, DETECTOR_VARIABLE, MAX_GUIDANCE, MODEL_VARIABLE
from envs.vision.detect import CENTRES, EYE_VARIABLE, STOP
from envs.vision.settings import DEVICE_VARIABLE, SPLIT_VARIABLE

Policy = Callable[[int, np.ndarray, np.random.Generator], Any]  # (steps so far, observation, rng) → an action
ENVIRONMENTS = {"detect": "Detect-v0", "denoise": "Denoise-v0"}
MAX_STRIDE = 4  # of Denoise-v0
WORTH_A_LOOK = 0.16  # of salience; the best of eight on 400 scenes of the held-out split


@dataclasses.dataclass
class Config:
    environments: tuple[Literal["detect", "denoise"], ...] = ("detect", "denoise")
    agents: tuple[str, ...] = ("a2c", "trpo", "ddpg")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    """Environment steps of training; None: the recipe's."""
    episodes: int = 400
    """Of each evaluation."""
    detector: Path | None = None
    diffusion: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the environments' models run; the agents' own networks stay on the CPU."""
    jobs: int = 1
    """Agents that train at a time, each in a process of its own."""
    toy: bool = False
    baselines_only: bool = False
    """Play the baselines of the environments, print their returns as JSON, one line each, and write nothing."""
    output: Path = Path("benchmarks/results/vision_agents.json")


def main(config: Config) -> None:
    if config.toy:
        config = dataclasses.replace(config, steps=256, episodes=4, seeds=config.seeds[:1])
    os.environ[DEVICE_VARIABLE] = config.device
    for folder, variables in (
        (config.detector, (EYE_VARIABLE, DETECTOR_VARIABLE)),
        (config.diffusion, (MODEL_VARIABLE,)),
    ):
        if folder:
            os.environ.update(dict.fromkeys(variables, str(folder.resolve())))
    for name in config.environments:
        if config.baselines_only:
            print(json.dumps(play_baselines(config, name)))
        else:
            compare(config, name)


def compare(config: Config, name: str) -> None:
    """Train agents and play baselines, in processes side by side."""
    before = json.loads(config.output.read_text()) if config.output.exists() else []
    found: dict[str, dict[int, float]] = {agent: {} for agent in config.agents}
    baselines: dict[str, Any] = {}

    def play() -> None:
        command = [sys.executable, "-m", "benchmarks.vision_agents", "--baselines-only", "--environments", name]
        command += ["--episodes", str(config.episodes), "--device", config.device]
        said = quietly(command, share_of_cores(config.jobs + 1))
        baselines.update(json.loads(said.splitlines()[-1]))
        print(name, json.dumps(baselines), flush=True)

    def train(agent: str, seed: int) -> None:
        found[agent][seed] = trained(config, agent, name, seed)
        print(name, agent, seed, found[agent][seed], flush=True)

    pieces = [play, *(partial(train, *pair) for pair in itertools.product(config.agents, config.seeds))]
    for _ in side_by_side(pieces, config.jobs + 1):  # written each time, for it may be cut short
        agents = {agent: [returns[seed] for seed in sorted(returns)] for agent, returns in found.items()}
        config.output.write_text(json.dumps(before))
        write_result(config.output, f"vision_agents/{name}", agents, baselines, above_baselines(agents, baselines))


def above_baselines(agents: dict[str, list[float]], baselines: dict[str, Any]) -> dict[str, Any]:
    if not baselines:
        return {}
    best = max(baselines["random"], baselines["fixed"])
    means = {agent: float(np.mean(returns)) for agent, returns in agents.items() if returns}
    return {"above_random_and_fixed": {agent: round(mean - best, 4) for agent, mean in means.items()}}


def play_baselines(config: Config, name: str) -> dict[str, Any]:
    """Mean returns on held-out scenes, and the schedule that did best on training scenes."""
    schedules = detect_schedules() if name == "detect" else denoise_schedules()
    on_training = {label: mean_return(config, name, "train", policy) for label, policy in schedules.items()}
    best = max(on_training, key=lambda label: on_training[label])
    anything = random_window if name == "detect" else random_steering
    rule = {"rule": mean_return(config, name, "heldout", what_stands_out)} if name == "detect" else {}
    return {
        "random": mean_return(config, name, "heldout", anything),
        "fixed": mean_return(config, name, "heldout", schedules[best]),
        **rule,
        "fixed_schedule": best,
        "schedules_on_training_scenes": on_training,
    }


def mean_return(config: Config, name: str, split: str, policy: Policy) -> float:
    """Of one episode in each environment of a vector."""
    env = gymnasium.make_vec(ENVIRONMENTS[name], num_envs=config.episodes, split=split)
    observations, _ = env.reset(seed=10_000)
    rng, totals, running, step = np.random.default_rng(0), np.zeros(config.episodes), np.ones(config.episodes, bool), 0
    while running.any():
        actions = np.array([policy(step, observation, rng) for observation in observations])
        observations, rewards, terminated, truncated, _ = env.step(actions)
        totals += rewards * running
        running &= ~(terminated | truncated)
        step += 1
    env.close()
    return round(float(totals.mean()), 4)


def detect_schedules() -> dict[str, Policy]:
    quarters, close = [1, 2, 3, 4], list(range(5, STOP))
    orders = {"the whole": [0], "four quarters": quarters, "eight close-ups": close[:8], "twelve close-ups": close[:12],
              "eight close-ups on a checkerboard": [5, 7, 10, 12, 13, 15, 18, 20],
              "four quarters, the four inner close-ups": [*quarters, 10, 11, 14, 15]}  # fmt: skip
    return {f"{label}, then stop": _in_turn(order) for label, order in orders.items()}


def _in_turn(windows: Sequence[int]) -> Policy:
    return lambda step, observation, rng: windows[step] if step < len(windows) else STOP


def random_window(step: int, observation: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.integers(STOP + 1))


def what_stands_out(step: int, observation: np.ndarray, rng: np.random.Generator) -> int:
    """The close-up nearest to what stands out most, until nothing does."""
    x, y, salience = observation[-4:-1]
    if salience < WORTH_A_LOOK:
        return STOP
    close_ups = CENTRES[-1]
    looked = observation[STOP - len(close_ups) : STOP] > 0
    distances = np.linalg.norm(close_ups - (x, y), axis=1)
    return STOP - len(close_ups) + int(np.where(looked, np.inf, distances).argmin())


def denoise_schedules() -> dict[str, Policy]:
    """Constant guidance and stride, without fresh noise; the first picture is handed in."""
    pairs = itertools.product((1.0, 2.0, 2.5, 3.0, 4.0, 5.0), (1, 2, 4))
    return {f"guidance {guidance:g}, stride {stride}": _steering(guidance, stride) for guidance, stride in pairs}


def _steering(guidance: float, stride: int) -> Policy:
    action = [(guidance - 1) / (MAX_GUIDANCE - 1) * 2 - 1, -1.0, (stride - 1) / (MAX_STRIDE - 1) * 2 - 1, -1.0]
    return lambda step, observation, rng: np.array(action, np.float32)


def random_steering(step: int, observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, ACTIONS).astype(np.float32)


def trained(config: Config, agent: str, name: str, seed: int) -> float:
    """The return on held-out scenes of a policy that was trained on others."""
    with tempfile.TemporaryDirectory(prefix="vision-agents-") as runs_dir:
        common = ["--runs-dir", runs_dir]
        train = ["train", agent, "--recipe", f"{agent}-{name}", "--name", "run", "--seed", str(seed), *common]
        train += ["--backend", "local", "--eval-episodes", str(min(config.episodes, 32))]  # of training scenes
        if config.steps:
            train += ["--steps", str(config.steps), "--eval-every", str(config.steps)]
        launch(config, train, split="train")
        evaluate = ["evaluate", "run", "--backend", "local", "--eval-episodes", str(config.episodes), *common]
        launch(config, evaluate, split="heldout")
        return round(last_evaluation(Path(runs_dir) / "run")["eval/return_mean"], 4)


def launch(config: Config, arguments: list[str], split: str) -> None:
    quietly([sys.executable, "-m", "launch", *arguments], {SPLIT_VARIABLE: split, **share_of_cores(config.jobs + 1)})


if __name__ == "__main__":
    import envs.vision  # registers the environments

    assert envs.vision
    main(tyro.cli(Config))
