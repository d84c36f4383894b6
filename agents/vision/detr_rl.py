"""Tuning a detector by the score that its answers get (Pinto et al., "Tuning computer vision models with task rewards",
arXiv 2302.08242), where the set loss is only a stand-in for it.

    draw K answers an image ──▶ score each against the truth ──▶ leave-one-out baseline ──▶ REINFORCE

The reward is `box_quality` (envs/vision/box_quality.py): PQ's form on boxes, of the whole answer. Both the drawing and
the gradient are of one forward pass, in eval mode, so there is nothing off-policy to correct.

Only labels are drawn. Boxes (and masks) keep learning from their part of the set loss: labels and boxes share all
layers but the last, and with nothing to hold them the boxes drift faster than the labels improve.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grad_norm_

from agents.evaluation import UNLOGGED
from agents.vision.detection_policy import answer_log_probs, leave_one_out, reinforce_loss, sample_answers
from agents.vision.detection_score import refuse_divergence
from agents.vision.heldout import evaluation, show
from agents.vision.prefetch import in_order
from agents.vision.reward_calls import paid
from envs.vision.answer_reward import AnswerScorer
from envs.vision.custom_reward import import_reward
from envs.vision.example import Batch
from envs.vision.sources import BatchLoader, DataConfig, Source, make_source
from models.detr.boxes import cxcywh_to_xyxy
from models.detr.checkpoint import load_detr, save_detr
from models.detr.detr import Detr
from models.detr.labels import with_labels
from models.detr.loss import SetLossConfig, set_loss
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run

HOLD = SetLossConfig(label=0.0)


@dataclass(frozen=True)
class DetrRLConfig:
    model: Path = Path()
    """The detector to tune: a DETR folder (RUN/model/final of `train detr`) or a .pth file."""
    dilation: bool = False
    """The .pth is of a DC5 model, with a dilated backbone: needed where the file does not say so itself."""
    data: DataConfig = field(default_factory=DataConfig)
    reward: str = "envs.vision.box_quality:box_quality"
    """`module:function(boxes, labels, true_boxes, true_labels) -> float`; boxes are xyxy, relative to the image."""
    reward_timeout_s: float = 300.0
    """A reward that takes longer over one batch's answers ends the run, after a checkpoint."""
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
                     "loader_timeout_s", "reward_timeout_s"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        if self.samples < 2:
            raise UserError(f"--samples is {self.samples}: a leave-one-out baseline needs at least 2")


def train(config: DetrRLConfig, run: "Run") -> None:
    """The `detr-rl` job. Evaluates before the first step, and writes model/final.

    A reward that fails, or an image that cannot be read, ends the run with what was learned before it saved. If that
    was in an evaluation, a resumed run begins with it.
    """
    source = make_source(config.data, run.seed, heldout=True)
    scorer = start_scorer(config, source, run)  # a reward that there is not is named before the detector is loaded
    tuner = DetectorTuner(config, source.names, run.seed, run.device, source.category_ids)
    loaders = start_loaders(config, tuner, run)
    state = run.restore()
    if state is not None:
        tuner.load_state(state)
        if UNLOGGED in state:
            evaluate_and_save(config, run, tuner, loaders, source)
    else:
        figures = evaluation(config, tuner.net, loaders, source, run)
        show(config, tuner.net, 0, loaders, source, run)
        run.log(0, figures, config.steps)
        run.summarize({name.replace("eval/", "eval/before/"): value for name, value in figures.items()})
    clock, saved = time.perf_counter(), tuner.step
    numbers = ((number,) for number in range(tuner.step, config.steps))
    try:
        for batch, _ in in_order(loaders, "train_batch", numbers, config.loader_timeout_s):
            metrics = tuner.update(batch, scorer)
            if tuner.step % config.log_every == 0:
                metrics["time/images_per_s"] = config.log_every * config.batch_size / (time.perf_counter() - clock)
                run.log(tuner.step, metrics, config.steps)
                clock = time.perf_counter()
            if _is_due(config, tuner.step):
                evaluate_and_save(config, run, tuner, loaders, source)
                clock, saved = time.perf_counter(), tuner.step
    except UserError:  # a RewardFailed, or data that is broken
        if saved < tuner.step and tuner.is_finite():
            unlogged: dict[str, Any] = {UNLOGGED: {}} if _is_due(config, tuner.step) else {}
            run.save(tuner.step, tuner.state() | unlogged)
        raise
    save_detr(tuner.net, run.directory / "model" / "final")


def _is_due(config: DetrRLConfig, step: int) -> bool:
    """Whether an evaluation and a checkpoint follow this step."""
    return step % config.eval_every == 0 or step == config.steps


def evaluate_and_save(
    config: DetrRLConfig, run: "Run", tuner: "DetectorTuner", loaders: "ActorGroup", source: Source
) -> None:
    figures = evaluation(config, tuner.net, loaders, source, run)
    show(config, tuner.net, tuner.step, loaders, source, run)
    run.log(tuner.step, figures, config.steps)
    run.summarize(figures)
    run.save(tuner.step, tuner.state(), score=figures["eval/quality"])


def evaluate(config: DetrRLConfig, run: "Run") -> None:
    """`longstride evaluate RUN`: the checkpoint's weights on `eval_images` held-out images."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    source = make_source(config.data, run.seed, heldout=True)
    tuner = DetectorTuner(config, source.names, run.seed, run.device, source.category_ids)
    tuner.load_state(state)
    figures = evaluation(config, tuner.net, start_loaders(config, tuner, run), source, run)
    run.log(tuner.step, figures)
    run.summarize(figures)


def check(config: DetrRLConfig, run: "Run") -> None:
    """For `--dry-run`: the reward, both parts of the data, and the model."""
    import_reward(config.reward)
    make_source(config.data, run.seed, heldout=False)
    source = make_source(config.data, run.seed, heldout=True)
    DetectorTuner(config, source.names, run.seed, run.device, source.category_ids)


def start_scorer(config: DetrRLConfig, source: Source, run: "Run") -> "ActorGroup":
    """The reward's own process, so that one that hangs can be ended."""
    no_thing = [*source.stuff, len(source.names)]
    return run.actors(AnswerScorer, 1, {"cpu": 1}, config.reward, no_thing, name="reward")


def start_loaders(config: DetrRLConfig, tuner: "DetectorTuner", run: "Run") -> "ActorGroup":
    arguments = config.data, run.seed, config.batch_size, tuner.net.config.mask_head
    return run.actors(BatchLoader, config.loaders, {"cpu": 1}, *arguments, name="loader")


class DetectorTuner:
    """Detector and optimizer: all that a checkpoint has to hold.

    category_ids: COCO's numbers for the labels, asked for where the detector does not name its own.
    """

    def __init__(
        self, config: DetrRLConfig, names: tuple[str, ...], seed: int, device: str, category_ids: Sequence[int] = ()
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        if not config.model.parts:
            raise UserError("--model is missing: give the detector to tune, RUN/model/final of `train detr`")
        loaded = load_detr(config.model, config.dilation)
        self.net: Detr = with_labels(loaded, names, category_ids, str(config.model)).to(device)
        self.net.backbone.requires_grad_(False)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0, fused=True)
        self.step = 0

    def update(self, batch: Batch, scorer: "ActorGroup") -> dict[str, float]:
        """One step. Raises RewardFailed, and UserError if answers or gradient are not finite: the weights stay."""
        config, there = self.config, batch.to_device(self.device)
        output = self.net(there.images_BCHW, there.valid_BHW)
        refuse_divergence(output)
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "answers", self.step))
        labels_KBQ = sample_answers(output.logits_BQC, config.samples, generator)
        asked = scorer.call(
            0,
            "score",
            labels_KBQ.cpu().numpy(),
            cxcywh_to_xyxy(output.boxes_BQ4.detach()).cpu().numpy(),
            there.targets.labels_BT.cpu().numpy(),
            cxcywh_to_xyxy(there.targets.boxes_BT4).cpu().numpy(),
            there.targets.valid_BT.cpu().numpy(),
            timeout_s=config.reward_timeout_s,
        )
        # While the answers are scored:
        log_probs_KB = answer_log_probs(output.logits_BQC, labels_KBQ)
        held, _ = set_loss(output, there.targets, HOLD)
        rewards_KB = torch.from_numpy(paid(config.reward, config.reward_timeout_s, [asked])).to(self.device)
        advantages_KB = leave_one_out(rewards_KB)
        self.optimizer.zero_grad()
        (reinforce_loss(log_probs_KB, advantages_KB) + held).backward()
        norm = clip_grad_norm_(self.parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise UserError(f"the gradient is not finite at step {self.step + 1}: train again with a lower --lr")
        self.optimizer.step()
        self.step += 1
        return {
            "train/reward": rewards_KB.mean().item(),
            "train/reward_std": rewards_KB.std(0).mean().item(),
            "train/boxes": (labels_KBQ < self.net.config.num_labels).sum(-1).float().mean().item(),
            "train/log_prob": log_probs_KB.mean().item(),
            "train/grad_norm": norm,
        }

    def is_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
