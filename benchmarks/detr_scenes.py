"""DETR on scenes, trained from random weights, and transformers' DETR of the same size beside it.

python -m benchmarks.detr_scenes                 # on the GPU: the recipe's steps take 7 minutes of an H100
python -m benchmarks.detr_scenes --peer --steps 2500    # the same steps with transformers' model too
python -m benchmarks.detr_scenes --toy --steps 60       # to see that it runs, on the CPU

The peer has the same shape, first weights, data, optimizer, averaging and dense head, its own losses, and its batch
norms, which transformers freezes, learn as ours do. It runs eagerly.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from agents.vision import detr as job
from agents.vision.dense_scaffold import dense_loss
from agents.vision.detr_learner import DetrLearner, NetworkConfig
from benchmarks.record import describe_machine, write_result
from benchmarks.training_run import folder_or_archive, follow
from envs.vision.example import DeviceBatch
from models.detr.checkpoint import load_detr, save_detr
from models.detr.detr import DetrOutput
from models.seeding import derive_seed

TOY = (
    "--data.scenes.size 64 --network.hidden-sizes 16 32 64 --network.depths 1 1 1 --network.d-model 64 --batch-size 8 "
    "--network.ffn-dim 64 --eval-images 32 --loaders 1 --device cpu --optimizer.precision float32 "
    "--optimizer.no-compile --optimizer.warmup 10 --log-every 10"
)


@dataclasses.dataclass
class Config:
    steps: int | None = None
    """None: the recipe's. The last one falls to a learning rate of 0: a shorter run is not a part of a longer one."""
    seed: int = 0
    peer: bool = False
    toy: bool = False
    cuda_graphs: bool = False
    """For ours; the peer runs eagerly."""
    backend: str = "ray"
    weights: Path | None = None
    """Folder, or .tar file, for the trained detector in half precision, with its figures: what the package brings
    along."""
    output: Path = Path("benchmarks/results/detr_scenes.json")


def main(config: Config) -> None:
    runs_dir = Path(tempfile.mkdtemp(prefix="detr-"))
    ours = run(config, runs_dir, "ours", peer=False)
    keep(config, ours, None)
    if config.weights:
        with folder_or_archive(config.weights) as folder:
            save_detr(load_detr(runs_dir / "ours" / "model" / "final"), folder, torch.float16)
            figures = {"command": ["python", "-m", "benchmarks.detr_scenes", *sys.argv[1:]], **ours}
            (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if config.peer:
        keep(config, ours, run(config, runs_dir, "peer", peer=True))


def keep(config: Config, ours: dict[str, Any], peer: dict[str, Any] | None) -> None:
    names = ("eval/AP", "eval/AP50", "eval/PQ", "images_per_s")
    ratio = {name: ours[name] / peer[name] for name in names if peer and peer.get(name)}
    write_result(config.output, "detr_scenes", ours, peer, ratio)
    print(json.dumps({"ours": ours, "peer": peer, "ratio": ratio}), flush=True)


def run(config: Config, runs_dir: Path, name: str, peer: bool) -> dict[str, Any]:
    """Train in a process of its own; return its figures. Compiling and evaluation are in `seconds` too."""
    begin = time.perf_counter()
    module = ["-m", "benchmarks.detr_scenes", "train-peer"] if peer else ["-m", "launch", "train", "detr"]
    flags = {
        "recipe": "detr-scenes-gpu",
        "runs-dir": runs_dir,
        "name": name,
        "seed": config.seed,
        "backend": config.backend,
    }
    if config.steps is not None:
        flags |= {"steps": config.steps, "eval-every": config.steps // 2 + 1}
    given = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    if config.toy:
        given += TOY.split()
    elif peer:  # its losses, with their lists of tensors, are part of its forward pass: nothing to compile
        given += ["--optimizer.no-compile"]
    elif config.cuda_graphs:
        given += ["--optimizer.cuda-graphs"]
    entries, summary = follow([sys.executable, *module, *given], runs_dir, name)
    speeds = [e["time/images_per_s"] for e in entries if "time/images_per_s" in e][1:]
    waits = [e["time/waited_for_images"] for e in entries if "time/waited_for_images" in e][1:]
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "steps": summary["steps"],
        "images_per_s": round(median(speeds), 1),
        "waited_for_images": round(mean(waits), 3),
        "evaluations": [{"step": e["step"], "AP": e["eval/AP"]} for e in entries if "eval/AP" in e],
        **{key: round(value, 4) for key, value in summary["metrics"].items() if key.startswith("eval/")},
        "machine": describe_machine(),
    }


class PeerModel(nn.Module):
    """transformers' DETR under our forward's signature. `losses` uses its own criterion."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor, valid_BHW: Tensor | None = None, masks: bool = True) -> DetrOutput:
        out = self.model(images_BCHW, valid_BHW)
        return DetrOutput(out.logits[None], out.pred_boxes[None], out.pred_masks)


class PeerScaffold(nn.Module):
    """The same dense head on the same feature map."""

    def __init__(self, net: PeerModel) -> None:
        super().__init__()
        self.net = net
        config = net.model.config
        self.head = nn.Conv2d(config.backbone_config.hidden_sizes[-1], config.num_labels + 1, 1)
        self.features: list[tuple[Tensor, Tensor]] = []
        net.model.detr.model.backbone.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, features: list[tuple[Tensor, Tensor]]) -> None:
        self.features = features

    def forward(self, images: Tensor, valid: Tensor | None, labels: Any) -> tuple[Any, Tensor]:
        out = self.net.model(images, valid, labels=labels)
        return out, self.head(self.features[-1][0])


class PeerLearner(DetrLearner):
    def build(self, start: Path | None, network: NetworkConfig, names: tuple[str, ...]) -> Any:
        from transformers import DetrForSegmentation

        with tempfile.TemporaryDirectory() as folder:  # the same random weights
            save_detr(super().build(start, network, names), folder)
            model = DetrForSegmentation.from_pretrained(folder)
        model.config.auxiliary_loss = True
        model.config.mask_loss_coefficient = int(self.loss.mask)
        model.config.dice_loss_coefficient = int(self.loss.dice)
        _let_batch_norms_learn(model)
        return PeerModel(model).requires_grad_(True)

    def scaffolded(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "scaffold"))
            return PeerScaffold(self.net)  # type: ignore[arg-type]

    def losses(self, batch: DeviceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        targets, labels = batch.targets, []
        assert targets.masks_BTHW is not None
        for i, valid in enumerate(targets.valid_BT):
            labels.append(
                {
                    "class_labels": targets.labels_BT[i, valid],
                    "boxes": targets.boxes_BT4[i, valid],
                    "masks": targets.masks_BTHW[i, valid].float(),
                }
            )
        with self._autocast():
            out, cells_BChw = self.forward(batch.images_BCHW, batch.valid_BHW, labels)
        dense = dense_loss(cells_BChw, targets, batch.valid_BHW)
        names = {"label": "loss_ce", "box": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}
        parts = {name: out.loss_dict[theirs] for name, theirs in names.items()}
        return out.loss + self.settings.dense_weight * dense, parts | {"dense": dense}


def _let_batch_norms_learn(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ == "DetrFrozenBatchNorm2d":
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            _let_batch_norms_learn(child)


@contextlib.contextmanager
def peer_in_the_job() -> Iterator[None]:
    """The job itself, with the other learner and no folder written at the end."""
    learner, save = job.DetrLearner, job.save_detr
    job.DetrLearner, job.save_detr = PeerLearner, lambda model, folder: None  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        job.DetrLearner, job.save_detr = learner, save  # type: ignore[misc]


if __name__ == "__main__":
    if sys.argv[1:2] == ["train-peer"]:
        from launch.cli import main as launch_main

        torch.set_float32_matmul_precision("high")
        with peer_in_the_job():
            raise SystemExit(launch_main(["train", "detr", *sys.argv[2:]]))
    main(tyro.cli(Config))
