"""The `diffusion` job: latent diffusion (Rombach et al. 2022, arXiv 2112.10752) from scratch on captioned images.

    images ──▶ autoencoder: reconstruct ──▶ latents of all images, scaled to unit variance
    captions ──▶ tokenizer: byte pairs   ──▶ denoiser and text encoder: predict the noise ──▶ their average (EMA)

Steps count through both phases: the autoencoder's first, then the denoiser's. What is left at the end is model/final, a
folder that `models.diffusion.folder` and diffusers load.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.vision.diffusion_config import LearningConfig, NetworkConfig
from agents.vision.diffusion_learner import AutoencoderLearner, DenoiserLearner
from agents.vision.pictures import as_bytes
from agents.vision.prefetch import in_order
from envs.vision.captioned import CaptionedConfig, CaptionedLoader, make_captioned
from envs.vision.scene_agreement import SceneAgreement
from models.diffusion.folder import save_folder
from models.diffusion.pipeline import LatentDiffusion, text_to_image
from models.diffusion.tokenizer import PromptTokenizer, train_tokenizer
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run

_LOADED_AT_ONCE = 128  # images to a call of a loader, and to a pass of the autoencoder that only encodes


@dataclass(frozen=True)
class DiffusionConfig:
    data: CaptionedConfig = field(default_factory=CaptionedConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    loaders: int = 2
    """Actors that render or read the images."""
    sample_steps: int = 25
    """Of DPM-Solver++, for the pictures that show the progress."""
    guidance: float = 4.0
    """Of those pictures: how far to move away from the empty caption."""
    samples: int = 16
    """Pictures to draw, of held-out captions."""
    detector: Path | None = None
    """DETR trained on scenes: evaluation then counts the objects of held-out captions that it finds in the pictures."""
    eval_every: int = 2000
    """Steps from one evaluation and checkpoint to the next."""
    log_every: int = 50
    loader_timeout_s: float = 120.0
    """A call that takes a loader longer ends the loader, and is repeated by a new one."""

    def __post_init__(self) -> None:
        for name in ("loaders", "sample_steps", "samples", "eval_every", "log_every", "loader_timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        factor = self.network.autoencoder().factor
        if self.data.size % factor:
            raise UserError(
                f"--data.scenes.size is {self.data.size}: {len(self.network.autoencoder_widths)} widths of the "
                f"autoencoder need a multiple of {factor}"
            )


def train(config: DiffusionConfig, run: "Run") -> None:
    """Resumes bit for bit on the same device: what a step draws depends on the seed and its number alone."""
    loaders = start_loaders(config, run)
    training, heldout = (load_images(config, loaders, heldout) for heldout in (False, True))
    loaders.close()
    images = training.images.to(run.device)
    tokenizer = make_tokenizer(config, run, training.captions)
    state = run.restore() or {}

    autoencoder = AutoencoderLearner(config.network, config.learning, run.seed, run.device)
    if "autoencoder" in state:
        autoencoder.load_state(state["autoencoder"])
    autoencoder_steps, total = config.learning.autoencoder_steps, config.learning.total_steps
    for step, last_of_stretch, clock in stretches(config, autoencoder.step, autoencoder_steps):
        metrics = autoencoder.update(images, want_metrics=last_of_stretch)
        if last_of_stretch:
            run.log(step, metrics | clock.figures(config.learning.autoencoder_batch_size), total)
        if step % config.eval_every == 0 or step == autoencoder_steps:
            figures, pictures = autoencoder.evaluate(heldout.images)
            run.log(step, figures, total)
            run.images(step, "reconstructions", pictures[: config.samples])
            if step == autoencoder_steps:
                autoencoder.set_scale(images)
            run.save(step, {"autoencoder": autoencoder.state()})

    latents = autoencoder.encode_all(images)
    tokens = tokenizer(training.captions).to(run.device)
    denoiser = make_denoiser(config, run, tokenizer)
    if "denoiser" in state:
        denoiser.load_state(state["denoiser"])
    for step, last_of_stretch, clock in stretches(config, autoencoder_steps + denoiser.step, total):
        metrics = denoiser.update(latents, tokens, want_metrics=last_of_stretch)
        if last_of_stretch:
            run.log(step, metrics | clock.figures(config.learning.batch_size), total)
        if step % config.eval_every == 0 or step == total:
            figures = evaluation(config, run, step, autoencoder, denoiser, tokenizer, heldout)
            run.log(step, figures, total)
            run.summarize(figures)
            both = {"autoencoder": autoencoder.state(), "denoiser": denoiser.state()}
            run.save(step, both, score=-figures["eval/denoising_loss"])
    save_folder(trained_model(autoencoder, denoiser, tokenizer), run.directory / "model" / "final")


def evaluate(config: DiffusionConfig, run: "Run") -> None:
    """Losses on held-out images, and pictures of held-out captions, of the run's checkpoint."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    if "denoiser" not in state:
        raise UserError(f"{run.name} is still training its autoencoder: there is no denoiser to evaluate yet")
    heldout = load_images(config, start_loaders(config, run), heldout=True)
    tokenizer = PromptTokenizer.load(run.directory / "tokenizer")
    autoencoder = AutoencoderLearner(config.network, config.learning, run.seed, run.device)
    autoencoder.load_state(state["autoencoder"])
    denoiser = make_denoiser(config, run, tokenizer)
    denoiser.load_state(state["denoiser"])
    run.summarize(evaluation(config, run, run.started_from, autoencoder, denoiser, tokenizer, heldout))


def check(config: DiffusionConfig, run: "Run") -> None:
    """For `--dry-run`: both parts of the data, the detector and the autoencoder."""
    for heldout in (False, True):
        make_captioned(config.data, run.seed, heldout)
    if config.detector:
        SceneAgreement(config.detector, run.device)
    AutoencoderLearner(config.network, config.learning, run.seed, run.device)


def make_denoiser(config: DiffusionConfig, run: "Run", tokenizer: PromptTokenizer) -> DenoiserLearner:
    latent_size = config.data.size // config.network.autoencoder().factor
    return DenoiserLearner(config.network, config.learning, tokenizer, latent_size, run.seed, run.device)


@dataclass(frozen=True)
class Captioned:
    images: Tensor  # (N, H, W, 3) uint8
    captions: list[str]


def start_loaders(config: DiffusionConfig, run: "Run") -> "ActorGroup":
    return run.actors(CaptionedLoader, config.loaders, {"cpu": 1}, config.data, run.seed, name="loader")


def load_images(config: DiffusionConfig, loaders: "ActorGroup", heldout: bool) -> Captioned:
    """All images, on the CPU, and their captions."""
    total, _ = next(in_order(loaders, "count", [(heldout,)], config.loader_timeout_s))
    spans = [(heldout, at, min(_LOADED_AT_ONCE, total - at)) for at in range(0, total, _LOADED_AT_ONCE)]
    images = torch.empty(total, config.data.size, config.data.size, 3, dtype=torch.uint8)
    captions: list[str] = []
    for (part, names), _ in in_order(loaders, "load", spans, config.loader_timeout_s):
        images[len(captions) : len(captions) + len(names)] = torch.tensor(part)
        captions += names
    return Captioned(images, captions)


def make_tokenizer(config: DiffusionConfig, run: "Run", captions: list[str]) -> PromptTokenizer:
    """The run's own, kept in its folder."""
    folder = run.directory / "tokenizer"
    if not folder.is_dir():
        fresh = train_tokenizer(captions, config.network.vocab_size, config.network.prompt_length)
        draft = folder.with_name(".tokenizer.draft")
        draft.mkdir(exist_ok=True)
        fresh.save(draft)
        draft.rename(folder)
    return PromptTokenizer.load(folder)


def trained_model(
    autoencoder: AutoencoderLearner, denoiser: DenoiserLearner, tokenizer: PromptTokenizer
) -> LatentDiffusion:
    """The averaged weights, as a pipeline."""
    return LatentDiffusion(
        autoencoder.model, denoiser.averaged.unet, denoiser.averaged.text_encoder, tokenizer, denoiser.scheduler
    )


def evaluation(
    config: DiffusionConfig,
    run: "Run",
    step: int,
    autoencoder: AutoencoderLearner,
    denoiser: DenoiserLearner,
    tokenizer: PromptTokenizer,
    heldout: Captioned,
) -> dict[str, float]:
    """Held-out losses; pictures of the first held-out captions from noise that is the same each time."""
    figures, _ = autoencoder.evaluate(heldout.images)
    latents = autoencoder.encode_all(heldout.images)
    figures |= denoiser.evaluate(latents, tokenizer(heldout.captions).to(run.device))
    model = trained_model(autoencoder, denoiser, tokenizer)
    drawn = heldout.captions if config.detector else heldout.captions[: config.samples]
    pictures = draw(config, run, model, drawn)
    run.images(step, "samples", pictures[: config.samples])
    run.record(step, "captions", [{"picture": i, "caption": c} for i, c in enumerate(drawn[: config.samples])])
    if config.detector:
        agreement = SceneAgreement(config.detector, run.device)
        figures["eval/agreement"] = float(np.mean(agreement(pictures, drawn)))
        figures["eval/agreement/other_caption"] = float(np.mean(agreement(pictures, [*drawn[1:], drawn[0]])))
        figures["eval/agreement/real_images"] = float(np.mean(agreement(heldout.images.numpy(), drawn)))
    return figures


def draw(config: DiffusionConfig, run: "Run", model: LatentDiffusion, captions: list[str]) -> np.ndarray:
    """A picture (H, W, 3) uint8 of each caption, from the same noise each time."""
    parts = []
    for at in range(0, len(captions), _LOADED_AT_ONCE):
        generator = torch.Generator().manual_seed(derive_seed(run.seed, "samples", at))
        batch = captions[at : at + _LOADED_AT_ONCE]
        images = text_to_image(model, batch, steps=config.sample_steps, guidance=config.guidance, generator=generator)
        parts.append(as_bytes(images))
    return np.concatenate(parts)


class Clock:
    """Images a second since it was last asked."""

    def __init__(self) -> None:
        self._begin, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    def figures(self, batch_size: int) -> dict[str, float]:
        now = time.perf_counter()
        speed = self._steps * batch_size / (now - self._begin)
        self._begin, self._steps = now, 0
        return {"time/images_per_s": speed}


def stretches(config: DiffusionConfig, done: int, until: int) -> Iterator[tuple[int, bool, Clock]]:
    """Yield the number of each step to make, whether its metrics are to be logged, and the clock."""
    clock = Clock()
    for step in range(done + 1, until + 1):
        clock.tick()
        yield step, step % config.log_every == 0 or step == until, clock
