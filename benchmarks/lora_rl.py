"""RL with adapters against RL of every weight: the quickstart recipe's RL phase, several times from one SFT policy.

python -m benchmarks.lora_rl

Each variant is `full` or `lora`, and the learning rate. Runs that are finished in `runs_dir` are not run again.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro

from benchmarks.record import write_result

TARGETS = ("--rl.lora.targets", "all-linear", "experts.gate_up_proj", "experts.down_proj")
FLAGS = {"full": ("--rl.lora.rank", "0"), "lora": ("--rl.lora.rank", "16", *TARGETS)}


@dataclasses.dataclass
class Config:
    recipe: str = "quickstart"
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("full:1e-4", "lora:1e-3")
    runs_dir: Path = Path("runs/lora_rl")
    output: Path = Path("benchmarks/results/lora_rl.json")


def main(config: Config) -> None:
    figures: dict[str, dict[int, dict[str, object]]] = {variant: {} for variant in config.variants}
    for seed in config.seeds:
        sft = train(config, f"sft-{seed}", seed, "--rl.iterations", "0")
        for variant in config.variants:
            kind, _, lr = variant.partition(":")
            flags = ["--model", str(sft / "policy" / "final"), "--sft.steps", "0", "--rl.lr", lr]
            run = train(config, f"{kind}-{lr}-{seed}", seed, *flags, *FLAGS[kind])
            figures[variant][seed] = result(run)
            print(variant, seed, json.dumps(figures[variant][seed]), flush=True)
    full = {variant: runs for variant, runs in figures.items() if variant.startswith("full")}
    lora = {variant: runs for variant, runs in figures.items() if variant.startswith("lora")}
    write_result(config.output, "lora_rl", lora, peer=full)


def train(config: Config, name: str, seed: int, *flags: str) -> Path:
    run = config.runs_dir / name
    if not (run / "summary.json").exists() or json.loads((run / "summary.json").read_text())["status"] != "finished":
        command = [sys.executable, "-m", "launch", "train", "reason", "--recipe", config.recipe, "--name", name]
        command += ["--seed", str(seed), "--runs-dir", str(config.runs_dir), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def result(run: Path) -> dict[str, object]:
    """Held-out figures before (the SFT policy) and after, and the reward along the way."""
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [round(row["train/reward"], 3) for row in rows if "train/reward" in row]
    figures = {
        name: {tag: round(metrics[f"heldout/{name}/{key}"], 4) for tag, key in (("sft", "base"), ("rl", "rl"))}
        for name in ("pass@1", "greedy", "mean_tokens")
    }
    return {**figures, "train_reward_every_5": rewards[::5], "mismatch_kl": metrics["train/mismatch_kl"]}


if __name__ == "__main__":
    main(tyro.cli(Config))
