"""The `ddpo` job: tuning a diffusion model by reward (Black et al. 2023, arXiv 2305.13301).

    prompts ──▶ sample: S noisy DDIM steps each, kept ──▶ decode ──▶ reward model (an actor, meanwhile we sample on)
       ▲                                                                      │ advantages, prompt by prompt
       └────────── new weights (LoRA, or the whole UNet) ◀── policy gradient on every kept step ◀──┘

What is left at the end is in model/final: diffusers' pytorch_lora_weights.safetensors, or with --lora-r 0 a whole
folder.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from agents.evaluation import UNLOGGED
from agents.vision.ddpo_learner import DDPOLearner
from agents.vision.ddpo_sampler import SamplesAhead, sample
from agents.vision.pictures import as_bytes
from agents.vision.prefetch import KeptDying
from agents.vision.reward_calls import paid
from envs.vision.custom_reward import RewardFailed
from envs.vision.image_rewards import AGREEMENT, RewardScorer, find_reward
from envs.vision.scenes import SceneConfig, scene_caption
from models.diffusion.lora import ATTENTION
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run

DETECTOR_SHARE = 0.1  # of a GPU, as Ray accounts it


@dataclass(frozen=True)
class DDPOConfig:
    model: Path | None = None
    """Stable Diffusion v1 folder in diffusers' format: the model to tune. None: the one of scenes that comes with the
    package."""
    reward: str = "jpeg-compressibility"
    """jpeg-compressibility, jpeg-incompressibility, scene-agreement, or `module:function` of images (N, H, W, 3) uint8
    and N prompts."""
    detector: Path | None = None
    """DETR trained on scenes, for scene-agreement. None: the one that comes with the package."""
    prompts: Path | None = None
    """Text file with a prompt a line. None: captions of scenes."""
    scenes: SceneConfig = field(default_factory=lambda: SceneConfig(size=64, max_objects=3))
    scene_prompts: int = 64
    """Captions of scenes to train on."""
    estimator: Literal["is", "sf"] = "is"
    """is: importance sampling with clipping, several updates an iteration. sf: the score function, one update."""
    lora_r: int = 8
    """Rank of the adapters; 0 trains the whole UNet."""
    lora_targets: tuple[str, ...] = ATTENTION
    iterations: int = 100
    samples: int = 64
    """Images of an iteration."""
    images_per_prompt: int = 1
    """Of those, how many share a prompt, so that its mean is known at once. 1: prompts are drawn one by one."""
    batch_size: int = 16
    """Images in one pass of the network, in sampling and in training."""
    steps_at_once: int = 1
    """Denoising steps of those images in one pass of training. More is sooner where one step leaves the GPU idle, and
    takes more memory; the update is the same."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast in the UNet, in sampling and in training; weights, optimizer and probabilities stay in
    float32."""
    updates: int = 2
    """Steps of the optimizer in an iteration (1 with sf), each on its own share of the images."""
    steps: int = 20
    """Denoising steps, by DDIM with eta = 1."""
    guidance: float = 5.0
    """Classifier-free guidance, in sampling and in training; 1 is none."""
    lr: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    clip_range: float = 1e-4
    """Of the probability ratio. The log-probability is a mean over the latent's numbers, so that 1e-4 is for SD v1's
    16,384 of them: give more for smaller latents in proportion, 6e-3 for 256."""
    advantage_clip: float = 5.0
    statistics_buffer: int = 32
    """Latest rewards of each prompt that its mean and deviation are of."""
    statistics_min_count: int = 8
    """With fewer rewards than this a prompt is normalised by the whole batch."""
    eval_images: int = 64
    """Of held-out captions (of --prompts, if there is a file), always from the same noise."""
    eval_every: int = 10
    """Iterations from one evaluation and checkpoint to the next."""
    sampler_workers: int = 0
    """Actors that draw the images of the next iteration, with the weights that this one began with, while the learner
    makes its update. 0: the learner draws, with the newest weights, and then makes its update."""
    sampler_gpu: float = 0.4
    """Of a GPU for each of them, as Ray accounts it, which does not know of the learner's."""
    sampler_timeout_s: float = 600.0
    """A batch that takes a sampler longer ends the sampler, and is drawn again by a new one."""
    reward_timeout_s: float = 300.0
    """A reward that takes longer over one batch ends the run, after a checkpoint."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "model" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            flag = f"--{name.replace('_', '-')} is {value}"
            if name in ("lora_r", "weight_decay", "sampler_workers", "sampler_gpu"):
                if value < 0:
                    raise UserError(f"{flag}: must not be negative")
            elif value <= 0:
                raise UserError(f"{flag}: must be positive")
        if self.estimator == "sf" and self.updates != 1:
            raise UserError(f"--updates is {self.updates}: --estimator sf is right for the first update only; give 1")
        if self.estimator == "sf" and self.sampler_workers:
            raise UserError(
                f"--sampler-workers is {self.sampler_workers}: they draw with older weights, and --estimator sf is "
                "right for the newest only; give 0, or --estimator is"
            )
        if self.sampler_workers * self.batch_size > self.samples:
            raise UserError(
                f"--sampler-workers is {self.sampler_workers}: --samples {self.samples} are "
                f"{self.samples // self.batch_size} batches of --batch-size {self.batch_size}; give no more than these"
            )
        if self.samples % self.images_per_prompt:
            raise UserError(
                f"--samples is {self.samples}: must be a multiple of --images-per-prompt {self.images_per_prompt}"
            )
        if self.samples % (self.batch_size * self.updates):
            raise UserError(
                f"--samples is {self.samples}: must be a multiple of --batch-size {self.batch_size} times --updates "
                f"{self.updates}"
            )


def train(config: DDPOConfig, run: "Run") -> None:
    """Metrics are logged by iterations. A reward that fails ends the run with what was learned before it saved. If that
    was in an evaluation, a resumed run begins with it."""
    find_reward(config.reward, config.detector)  # before the diffusion model is loaded
    learner = DDPOLearner(config, run.seed, run.device)
    prompts, heldout = load_prompts(config, run.seed)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
    scorer = start_scorer(config, run)
    ahead = SamplesAhead(config, run, learner, scorer, prompts) if config.sampler_workers else None
    saved = learner.iteration
    try:
        if learner.iteration == 0:
            figures = evaluation(config, run, learner, scorer, heldout)
            run.log(0, figures, config.iterations)
            run.summarize({name.replace("eval/", "eval/before/"): value for name, value in figures.items()})
        elif state is not None and UNLOGGED in state:
            evaluate_and_save(config, run, learner, scorer, heldout, state[UNLOGGED])
        while learner.iteration < config.iterations:
            clock = time.perf_counter()
            rollout, rewards = ahead.take() if ahead else sample(config, run, learner, scorer, prompts)
            metrics = {"train/reward_mean": float(rewards.mean()), "train/reward_std": float(rewards.std())}
            metrics |= learner.update(rollout, rewards)
            if ahead:
                metrics["run/actor_restarts"] = float(ahead.actors.restarts)
            metrics["time/images_per_s"] = config.samples / (time.perf_counter() - clock)
            if _is_due(config, learner.iteration):
                evaluate_and_save(config, run, learner, scorer, heldout, metrics)
                saved = learner.iteration
            else:
                run.log(learner.iteration, metrics, config.iterations)
    except (RewardFailed, KeptDying):  # the latter of samplers
        if saved < learner.iteration:
            unlogged = {UNLOGGED: metrics} if _is_due(config, learner.iteration) else {}
            run.save(learner.iteration, learner.state() | unlogged)
        raise
    learner.save(run.directory / "model" / "final")


def _is_due(config: DDPOConfig, iteration: int) -> bool:
    """Whether an evaluation and a checkpoint follow this iteration."""
    return iteration % config.eval_every == 0 or iteration == config.iterations


def evaluate_and_save(
    config: DDPOConfig,
    run: "Run",
    learner: DDPOLearner,
    scorer: "ActorGroup",
    prompts: Sequence[str],
    metrics: Mapping[str, float],
) -> None:
    """metrics: of the iteration, logged with the figures."""
    figures = evaluation(config, run, learner, scorer, prompts)
    run.summarize(figures)
    run.log(learner.iteration, {**metrics, **figures}, config.iterations)
    run.save(learner.iteration, learner.state(), score=figures["eval/reward_mean"])


def evaluate(config: DDPOConfig, run: "Run") -> None:
    """Rewards of pictures of held-out prompts, of the run's checkpoint."""
    state = run.restore()
    if state is None:
        raise UserError(f"{run.name} has no checkpoint yet: there is nothing to evaluate")
    learner = DDPOLearner(config, run.seed, run.device)
    learner.load_state(state)
    scorer = start_scorer(config, run)
    _, heldout = load_prompts(config, run.seed)
    run.summarize(evaluation(config, run, learner, scorer, heldout))


def check(config: DDPOConfig, run: "Run") -> None:
    """For `--dry-run`: the reward, the model and the prompts."""
    find_reward(config.reward, config.detector)
    DDPOLearner(config, run.seed, run.device)
    load_prompts(config, run.seed)


def start_scorer(config: DDPOConfig, run: "Run") -> "ActorGroup":
    """The reward's own process. A detector works where the diffusion model does; other rewards are code."""
    device, share = (
        (run.device, DETECTOR_SHARE) if config.reward == AGREEMENT and run.device == "cuda" else ("cpu", 0.0)
    )
    resources = {"cpu": 1.0, "gpu": share}
    return run.actors(RewardScorer, 1, resources, config.reward, config.detector, device, name="reward")


def evaluation(
    config: DDPOConfig, run: "Run", learner: DDPOLearner, scorer: "ActorGroup", prompts: Sequence[str]
) -> dict[str, float]:
    pictures, asked = [], []
    for at in range(0, len(prompts), config.batch_size):
        batch = prompts[at : at + config.batch_size]
        generator = torch.Generator().manual_seed(derive_seed(run.seed, "evaluation", at))
        _, images = learner.sample(batch, generator)
        pictures.append(as_bytes(images))
        asked.append(scorer.call(0, "score", pictures[-1], batch, timeout_s=config.reward_timeout_s))
    rewards = paid(config.reward, config.reward_timeout_s, asked)
    run.images(learner.iteration, "samples", np.concatenate(pictures)[:16])
    rows = [{"prompt": prompt, "reward": float(reward)} for prompt, reward in zip(prompts, rewards)]
    run.record(learner.iteration, "rewards", rows)
    return {"eval/reward_mean": float(rewards.mean()), "eval/reward_std": float(rewards.std())}


def load_prompts(config: DDPOConfig, seed: int) -> tuple[list[str], list[str]]:
    """Prompts to train on, and to evaluate with. Raises UserError for a file that cannot be read or is empty."""
    if config.prompts is None:
        trained = [scene_caption(config.scenes, seed, i, "train") for i in range(config.scene_prompts)]
        return trained, [scene_caption(config.scenes, seed, i, "heldout") for i in range(config.eval_images)]
    try:
        lines = config.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {config.prompts}: cannot be read ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {config.prompts}: holds no prompt; write one a line")
    return prompts, [prompts[i % len(prompts)] for i in range(config.eval_images)]
