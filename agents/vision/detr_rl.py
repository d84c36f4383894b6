"""Tuning a detector by the score that its answers get (Pinto et al., "Tuning computer vision models with task rewards",
arXiv 2302.08242), where the set loss is only a stand-in for it.

    draw K answers an image ──▶ score each against the truth ──▶ leave-one-out baseline ──▶ REINFORCE

The reward is `box_quality` (envs/vision/box_quality.py): PQ's form on boxes, of the whole answer. Both the drawing and
the gradient are of one forward pass, in eval mode, so there is nothing off-policy to correct.

Only labels are drawn. Boxes (and masks) keep learning from their part of the set loss: labels and boxes share all
layers but the last, and with nothing to hold them the boxes drift faster than the labels improve.
"""

import importlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from agents.vision.detection_policy import answer_log_probs, leave_one_out, reinforce_loss, sample_answers
from agents.vision.detection_score import evaluate_detector
from agents.vision.prefetch import in_order
from envs.vision.example import Batch
from envs.vision.sources import BatchLoader, DataConfig, Source, make_source
from models.detr.boxes import cxcywh_to_xyxy
from models.detr.checkpoint import load_detr, save_detr
from models.detr.detr import Detr
from models.detr.labels import with_labels
from models.detr.loss import SetLossConfig, set_loss
from models.detr.targets import Targets
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run

HOLD = SetLossConfig(label=0.0)

# boxes xyxy (n, 4) and labels (n,) of an answer, then of the truth, relative to the image → the reward
Reward = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class DetrRLConfig:
    model: Path = Path()
    """The detector to tune: a DETR folder (RUN/model/final of `train detr`) or a .pth file."""
    dilation: bool = False
    """The .pth is of a DC5 model, with a dilated backbone: needed where the file does not say so itself."""
    data: DataConfig = field(default_factory=DataConfig)
    reward: str = "envs.vision.box_quality:box_quality"
    """`module:function(boxes, labels, true_boxes, true_labels) -> float`."""
    steps: int = 500
    batch_size: int = 32
    samples: int = 8
    """Answers drawn for each image."""
    lr: float = 1e-5
    """Of AdamW, constant. The backbone and its norms stay as they are."""
    max_grad_norm: float = 1.0
    loaders: int = 2
    eval_images: int = 500
    eval_every: int = 100
    """Steps from one evaluation and checkpoint to the next."""
    log_every: int = 10
    loader_timeout_s: float = 120.0
    """A batch that takes a loader longer ends the loader, and is made again by a new one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "max_grad_norm", "loaders", "eval_images", "eval_every", "log_every",
                     "loader_timeout_s"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        if self.samples < 2:
            raise UserError(f"--samples is {self.samples}: a leave-one-out baseline needs at least 2")


def train(config: DetrRLConfig, run: "Run") -> None:
    """The `detr-rl` job. Evaluates before the first step, and writes model/final."""
    source = make_source(config.data, run.seed, heldout=True)
    tuner = DetectorTuner(config, source.names, source.stuff, run.seed, run.device, source.category_ids)
    loaders = run.actors(
        BatchLoader,
        config.loaders,
        {"cpu": 1},
        config.data,
        run.seed,
        config.batch_size,
        tuner.net.config.mask_head,
        name="loader",
    )
    state = run.restore()
    if state is not None:
        tuner.load_state(state)
    else:
        figures = evaluation(config, tuner, loaders, source, run)
        run.log(0, figures, config.steps)
        run.summarize({name.replace("eval/", "eval/before/"): value for name, value in figures.items()})
    clock = time.perf_counter()
    numbers = ((number,) for number in range(tuner.step, config.steps))
    for batch, _ in in_order(loaders, "train_batch", numbers, config.loader_timeout_s):
        metrics = tuner.update(batch)
        if tuner.step % config.log_every == 0:
            metrics["time/images_per_s"] = config.log_every * config.batch_size / (time.perf_counter() - clock)
            run.log(tuner.step, metrics, config.steps)
            clock = time.perf_counter()
        if tuner.step % config.eval_every == 0 or tuner.step == config.steps:
            figures = evaluation(config, tuner, loaders, source, run)
            run.log(tuner.step, figures, config.steps)
            run.summarize(figures)
            run.save(tuner.step, tuner.state(), score=figures["eval/quality"])
            clock = time.perf_counter()
    save_detr(tuner.net, run.directory / "model" / "final")


def evaluation(
    config: DetrRLConfig, tuner: "DetectorTuner", loaders: "ActorGroup", source: Source, run: "Run"
) -> dict[str, float]:
    count = min(config.eval_images, len(source))
    spans = [(first, min(config.batch_size, count - first)) for first in range(0, count, config.batch_size)]
    batches = (batch for batch, _ in in_order(loaders, "heldout_batch", spans, config.loader_timeout_s))
    return evaluate_detector(tuner.net, batches, source, count, run.device)


class DetectorTuner:
    """Detector and optimizer: all that a checkpoint has to hold. Labels in `stuff` are neither paid nor punished.

    category_ids: COCO's numbers for the labels, asked for where the detector does not name its own.
    """

    def __init__(
        self,
        config: DetrRLConfig,
        names: tuple[str, ...],
        stuff: Collection[int],
        seed: int,
        device: str,
        category_ids: Sequence[int] = (),
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        if not config.model.parts:
            raise UserError("--model is missing: give the detector to tune, RUN/model/final of `train detr`")
        self.no_thing = [*stuff, len(names)]
        self.reward = load_reward(config.reward)
        self.net: Detr = with_labels(
            load_detr(config.model, config.dilation), names, category_ids, str(config.model)
        ).to(device)
        self.net.backbone.requires_grad_(False)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0, fused=True)
        self.step = 0

    def update(self, batch: Batch) -> dict[str, float]:
        """One step. Raises UserError for a reward that raises or is not finite."""
        config, there = self.config, batch.to_device(self.device)
        output = self.net(there.images_BCHW, there.valid_BHW)
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "answers", self.step))
        labels_KBQ = sample_answers(output.logits_BQC, config.samples, generator)
        rewards_KB = self._score(labels_KBQ, output.boxes_BQ4, there.targets).to(self.device)
        log_probs_KB = answer_log_probs(output.logits_BQC, labels_KBQ)
        advantages_KB = leave_one_out(rewards_KB)
        self.optimizer.zero_grad()
        held, _ = set_loss(output, there.targets, HOLD)
        (reinforce_loss(log_probs_KB, advantages_KB) + held).backward()
        norm = clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return {
            "train/reward": rewards_KB.mean().item(),
            "train/reward_std": rewards_KB.std(0).mean().item(),
            "train/boxes": (labels_KBQ < self.net.config.num_labels).sum(-1).float().mean().item(),
            "train/log_prob": log_probs_KB.mean().item(),
            "train/grad_norm": norm.item(),
        }

    def _score(self, labels_KBQ: Tensor, boxes_BQ4: Tensor, targets: Targets) -> Tensor:
        """Rewards (K, B)."""
        drawn_KBQ = labels_KBQ.cpu().numpy()
        boxes = cxcywh_to_xyxy(boxes_BQ4.detach()).cpu().numpy()
        true_labels = targets.labels_BT.cpu().numpy()
        wanted = targets.valid_BT.cpu().numpy() & ~np.isin(true_labels, self.no_thing)
        true_boxes = cxcywh_to_xyxy(targets.boxes_BT4).cpu().numpy()
        rewards = np.zeros(drawn_KBQ.shape[:2], np.float32)
        for k, i in np.ndindex(rewards.shape):
            given = ~np.isin(drawn_KBQ[k, i], self.no_thing)
            truth = true_boxes[i, wanted[i]], true_labels[i, wanted[i]]
            rewards[k, i] = self._reward_of(boxes[i, given], drawn_KBQ[k, i, given], *truth)
        return torch.from_numpy(rewards)

    def _reward_of(self, *answer_and_truth: np.ndarray) -> float:
        try:
            reward = float(self.reward(*answer_and_truth))
        except Exception as error:
            raise UserError(
                f"the reward {self.config.reward} raised {type(error).__name__} at step {self.step}: {error}; the last "
                "checkpoint is good"
            ) from error
        if not math.isfinite(reward):
            raise UserError(
                f"the reward {self.config.reward} is {reward} at step {self.step}: it must be a finite number; "
                "the last checkpoint is good"
            )
        return reward

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def load_reward(path: str) -> Reward:
    """Import `module:function`. Raises UserError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--reward {path}: cannot be imported as module:function ({error})") from None
