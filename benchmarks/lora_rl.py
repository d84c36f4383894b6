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

LORA_FLAGS = ("--rl.lora.rank", "16", "--rl.lora.targets", "all-linear", "experts.gate_up_proj", "experts.down_proj")


@dataclasses.dataclass
class Config:
    recipe: str = "quickstart"
    seed: int = 0
    variants: tuple[str, ...] = ("full:1e-4", "lora:3e-4", "lora:1e-3", "lora:3e-3")
    runs_dir: Path = Path("runs/lora_rl")
    output: Path = Path("benchmarks/results/lora_rl.json")


def main(config: Config) -> None:
    sft = train(config, f"sft-{config.seed}", "--rl.iterations", "0")
    figures = {}
    for variant in config.variants:
        kind, _, lr = variant.partition(":")
        flags = ["--model", str(sft / "policy" / "final"), "--sft.steps", "0", "--rl.lr", lr]
        run = train(config, f"{kind}-{lr}-{config.seed}", *flags, *(LORA_FLAGS if kind == "lora" else ()))
        figures[variant] = result(run)
        print(variant, json.dumps(figures[variant]), flush=True)
    full = {variant: f for variant, f in figures.items() if variant.startswith("full")}
    lora = {variant: f for variant, f in figures.items() if variant.startswith("lora")}
    write_result(config.output, "lora_rl", {"seed": config.seed, "lora": lora}, peer={"full": full})


def train(config: Config, name: str, *flags: str) -> Path:
    run = config.runs_dir / name
    if not (run / "summary.json").exists() or json.loads((run / "summary.json").read_text())["status"] != "finished":
        command = [sys.executable, "-m", "launch", "train", "reason", "--recipe", config.recipe, "--name", name]
        command += ["--seed", str(config.seed), "--runs-dir", str(config.runs_dir), *flags]
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
