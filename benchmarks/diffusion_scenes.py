"""Latent diffusion on scenes, trained from random weights: does it draw what the caption says?

python -m benchmarks.diffusion_scenes                                            # on the GPU: the recipe's steps
python -m benchmarks.diffusion_scenes --toy --autoencoder-steps 60 --steps 60    # to see that it runs, on a CPU

Afterwards a detector that was trained apart (it may still be learning on another GPU until then) counts the objects of
held-out captions that it finds in the pictures: beside it the same pictures with another picture's caption, and real
images, which are the detector's own limit.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.record import describe_machine, write_result
from benchmarks.training_run import folder_or_archive, follow, last_evaluation
from envs.vision.shipped_weights import WEIGHTS
from launch.config import read_recipe
from models.diffusion.folder import load_folder, save_folder

RECIPE = "diffusion-scenes-gpu"
TOY = (
    "--data.scenes.size 32 --data.images 256 --data.heldout-images 16 --network.autoencoder-widths 16 16 16 16 "
    "--network.unet-widths 16 32 --network.unet-layers 1 --network.text-width 32 --network.text-layers 1 "
    "--learning.autoencoder-batch-size 8 --learning.batch-size 16 --learning.warmup 5 --learning.no-compile "
    "--loaders 1 --samples 4 --sample-steps 4 --device cpu --log-every 10"
)


@dataclasses.dataclass
class Config:
    autoencoder_steps: int | None = None
    """None: the recipe's."""
    steps: int | None = None
    """Of the denoiser. None: the recipe's."""
    seed: int = 0
    toy: bool = False
    cuda_graphs: bool = False
    backend: str = "ray"
    detector: Path | None = WEIGHTS / "detr-scenes" if (WEIGHTS / "detr-scenes").exists() else None
    weights: Path | None = None
    """Folder, or .tar file, for the trained model in half precision, with its figures: what the package brings
    along."""
    grid: Path | None = None
    """PNG file for the last grid of samples."""
    output: Path = Path("benchmarks/results/diffusion_scenes.json")


def main(config: Config) -> None:
    runs_dir = Path(tempfile.mkdtemp(prefix="diffusion-"))
    ours = train(config, runs_dir)
    keep(config, runs_dir, ours)
    if config.detector:
        evaluate = [sys.executable, "-m", "launch", "evaluate", "run", "--runs-dir", str(runs_dir)]
        flags = ["--backend", config.backend, "--detector", str(config.detector)]
        follow([*evaluate, *flags], runs_dir, "run")
        ours |= evaluated(last_evaluation(runs_dir / "run"))
        keep(config, runs_dir, ours)
    write_result(config.output, "diffusion_scenes", ours)
    print(json.dumps(ours, indent=1), flush=True)


def keep(config: Config, runs_dir: Path, ours: dict[str, Any]) -> None:
    """Weights and pictures, once they are trained and again once they are judged: a run cut short loses neither."""
    if config.weights:
        with folder_or_archive(config.weights) as folder:
            save_folder(load_folder(runs_dir / "run" / "model" / "final"), folder, torch.float16)
            figures = {"command": ["python", "-m", "benchmarks.diffusion_scenes", *sys.argv[1:]], **ours}
            (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if config.grid:
        shutil.copy(runs_dir / "run" / "images" / f"{sum(steps_of(config))}-samples.png", config.grid)


def steps_of(config: Config) -> tuple[int, int]:
    """Of the autoencoder and of the denoiser."""
    recipe = read_recipe(RECIPE, "diffusion")["learning"]
    autoencoder = recipe["autoencoder_steps"] if config.autoencoder_steps is None else config.autoencoder_steps
    return autoencoder, recipe["steps"] if config.steps is None else config.steps


def train(config: Config, runs_dir: Path) -> dict[str, Any]:
    """In a process of its own. Rendering, compiling and drawing samples are in `seconds` too."""
    begin = time.perf_counter()
    autoencoder_steps, steps = steps_of(config)
    command = [
        sys.executable, "-m", "launch", "train", "diffusion", "--recipe", RECIPE,
        "--runs-dir", str(runs_dir), "--name", "run", "--seed", str(config.seed), "--backend", config.backend,
        *(TOY.split() if config.toy else []), *(["--learning.cuda-graphs"] if config.cuda_graphs else []),
        "--learning.autoencoder-steps", str(autoencoder_steps), "--learning.steps", str(steps),
        "--eval-every", str(autoencoder_steps + steps),
    ]  # fmt: skip
    entries, summary = follow(command, runs_dir, "run")
    sizes = json.loads((runs_dir / "run" / "model" / "final" / "unet" / "config.json").read_text())
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "autoencoder_steps": autoencoder_steps,
        "steps": steps,
        "autoencoder_steps_per_s": steps_per_s(entries, "autoencoder/error", 8 if config.toy else 64),
        "steps_per_s": steps_per_s(entries, "train/denoising_loss", 16 if config.toy else 256),
        "unet_widths": sizes["block_out_channels"],
        **evaluated(summary["metrics"]),
        "machine": describe_machine(),
    }


def evaluated(figures: dict[str, Any]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in figures.items() if key.startswith("eval/")}


def steps_per_s(entries: list[dict[str, Any]], metric: str, batch_size: int) -> float:
    """Of the median stretch between two lines of metrics; the first one compiles."""
    speeds = sorted(e["time/images_per_s"] / batch_size for e in entries if metric in e)
    return round(speeds[len(speeds) // 2], 2)


if __name__ == "__main__":
    main(tyro.cli(Config))
