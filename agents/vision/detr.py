"""Training DETR on boxes, and on masks too: scenes rendered on the fly, or any COCO folder.

    loaders make batches ahead ──▶ forward ──▶ Hungarian matching ──▶ set loss on every decoder layer ──▶ AdamW ──▶ EMA

Evaluation is of the averaged weights (EMA), on held-out images: COCO's AP on things, panoptic quality with masks.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from agents.evaluation import UNLOGGED
from agents.vision.detr_learner import DetrLearner, NetworkConfig, OptimizerConfig
from agents.vision.heldout import evaluation, show
from agents.vision.prefetch import in_order
from envs.vision.sources import BatchLoader, DataConfig, Source, make_source
from models.detr.checkpoint import save_detr
from models.detr.loss import SetLossConfig
from models.errors import UserError

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run


@dataclass(frozen=True)
class DetrJobConfig:
    model: Path | None = None
    """DETR folder (transformers) or .pth file (original code) to begin from; of --network only masks may be set beside
    it. None: --network from random weights."""
    dilation: bool = False
    """The .pth is of a DC5 model, with a dilated backbone: needed where the file does not say so itself."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: SetLossConfig = field(default_factory=SetLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 20_000
    batch_size: int = 64
    loaders: int = 2
    """Actors that render or read images and collate them."""
    eval_images: int = 1000
    eval_every: int = 5000
    """Steps from one evaluation and checkpoint to the next."""
    log_every: int = 50
    loader_timeout_s: float = 120.0
    """A batch that takes a loader longer ends the loader, and is made again by a new one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "loaders", "eval_images", "eval_every", "log_every", "loader_timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        if self.dilation and self.model is None:
            raise UserError("--dilation is of the .pth that --model names, and there is none")
        plain = NetworkConfig(masks=self.network.masks)
        if self.model is not None and self.network != plain:
            name = next(f.name for f in fields(plain) if getattr(self.network, f.name) != getattr(plain, f.name))
            raise UserError(f"--network.{name.replace('_', '-')} is of no use beside --model, which has its own shape")


def train(config: DetrJobConfig, run: "Run") -> None:
    """The `detr` job. Writes model/final, a folder that transformers loads, and eval/... figures to summary.json.

    Data that ends the run (an image that cannot be read, or that ends its loaders) ends it after a checkpoint. If that
    was in an evaluation, a resumed run begins with it.
    """
    source = make_source(config.data, run.seed, heldout=True)
    learner = make_learner(config, source, run)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
    loaders = start_loaders(config, learner, run)
    if state is not None and UNLOGGED in state:
        evaluate_and_save(config, run, learner, loaders, source)
    clock, waited = time.perf_counter(), 0.0
    numbers = ((number,) for number in range(learner.step, config.steps))
    batches = in_order(loaders, "train_batch", numbers, config.loader_timeout_s)
    while learner.step < config.steps:
        with saved_if_data_fails(learner, run):
            batch, wait = next(batches)
        waited += wait
        metrics = learner.update(batch, want_metrics=(learner.step + 1) % config.log_every == 0)
        step = learner.step
        if metrics:
            elapsed = time.perf_counter() - clock
            metrics["time/images_per_s"] = config.log_every * config.batch_size / elapsed
            metrics["time/waited_for_images"] = waited / elapsed
            metrics["run/actor_restarts"] = float(loaders.restarts)
            run.log(step, metrics, config.steps)
            clock, waited = time.perf_counter(), 0.0
        if step % config.eval_every == 0 or step == config.steps:
            evaluate_and_save(config, run, learner, loaders, source)
            clock, waited = time.perf_counter(), 0.0
    save_detr(learner.averaged, run.directory / "model" / "final")


def evaluate(config: DetrJobConfig, run: "Run") -> None:
    """`longstride evaluate RUN`: the checkpoint's averaged weights on `eval_images` held-out images."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    source = make_source(config.data, run.seed, heldout=True)
    learner = make_learner(config, source, run)
    learner.load_state(state)
    figures = evaluation(config, learner.averaged, start_loaders(config, learner, run), source, run)
    run.log(learner.step, figures)
    run.summarize(figures)


def check(config: DetrJobConfig, run: "Run") -> None:
    """For `--dry-run`: both parts of the data, and the model."""
    make_source(config.data, run.seed, heldout=False)
    make_learner(config, make_source(config.data, run.seed, heldout=True), run)


def evaluate_and_save(
    config: DetrJobConfig, run: "Run", learner: DetrLearner, loaders: "ActorGroup", source: Source
) -> None:
    with saved_if_data_fails(learner, run, {UNLOGGED: {}}):
        show(config, learner.averaged, learner.step, loaders, source, run)
        figures = evaluation(config, learner.averaged, loaders, source, run)
    run.log(learner.step, figures, config.steps)
    run.summarize(figures)
    run.save(learner.step, learner.state(), score=figures.get("eval/AP"))  # without things there is no AP


@contextlib.contextmanager
def saved_if_data_fails(
    learner: DetrLearner, run: "Run", what_failed: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[None]:
    """Around what reads images: what was learned since the last checkpoint outlives one that is broken. what_failed:
    told to the checkpoint."""
    try:
        yield
    except UserError:
        if learner.step > 0 and learner.is_finite():  # weights that diverged may be why
            run.save(learner.step, learner.state() | dict(what_failed))
        raise


def make_learner(config: DetrJobConfig, source: Source, run: "Run") -> DetrLearner:
    settings = config.network, config.loss, config.optimizer
    return DetrLearner(
        config.model, source.names, *settings, config.steps, run.seed, run.device, source.category_ids, config.dilation
    )


def start_loaders(config: DetrJobConfig, learner: DetrLearner, run: "Run") -> "ActorGroup":
    arguments = config.data, run.seed, config.batch_size, learner.masks
    return run.actors(BatchLoader, config.loaders, {"cpu": 1}, *arguments, name="loader")
