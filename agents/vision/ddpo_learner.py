"""The policy of DDPO: a diffusion model that keeps its steps when it samples, and learns from them.

Shapes: S denoising steps, G of them in one pass, B images in a batch, N in a rollout, Z latent channels, h × w latent
pixels, M tokens of E.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from agents.vision.ddpo_loss import (
    StepBatch,
    gaussian_log_prob,
    importance_sampling_loss,
    policy_change,
    score_function_loss,
)
from agents.vision.prompt_statistics import PromptStatistics
from envs.vision.shipped_weights import scenes_model
from models.diffusion.folder import load_folder, save_folder
from models.diffusion.graphed_unet import GraphedUNet
from models.diffusion.lora import attach_lora, save_lora
from models.diffusion.noise_schedule import draw_noise
from models.diffusion.pipeline import guided_prediction
from models.diffusion.schedulers import DDIM
from models.errors import UserError
from models.language.lora import LoraConfig
from models.seeding import derive_seed

if TYPE_CHECKING:
    from agents.vision.ddpo import DDPOConfig


@dataclass(frozen=True)
class Rollout:
    """Sampled images, as the steps that made them."""

    prompts: list[str]
    contexts_NME: Tensor
    latents_NSZhw: Tensor  # S + 1 of them: before the first step to after the last
    log_probs_NS: Tensor  # of each step, under the policy that took it

    @staticmethod
    def join(parts: "Sequence[Rollout]") -> "Rollout":
        return Rollout(
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.contexts_NME for part in parts]),
            torch.cat([part.latents_NSZhw for part in parts]),
            torch.cat([part.log_probs_NS for part in parts]),
        )

    def to(self, device: torch.device | str) -> "Rollout":
        tensors = self.contexts_NME, self.latents_NSZhw, self.log_probs_NS
        return Rollout(self.prompts, *(tensor.to(device) for tensor in tensors))


class DDPOLearner:
    """Model, optimizer, statistics and counter. Raises UserError for a model folder that cannot be loaded."""

    def __init__(self, config: "DDPOConfig", seed: int, device: str) -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.folder = scenes_model("diffusion", config.model, "--model")
        self.model = load_folder(self.folder, device=device)
        if config.lora_r:
            lora = LoraConfig(config.lora_r, float(config.lora_r), config.lora_targets)
            attach_lora(self.model.unet, lora, derive_seed(seed, "lora"))
        else:
            self.model.unet.requires_grad_(True)
        self.denoiser = GraphedUNet(self.model.unet) if self.device.type == "cuda" else self.model.unet
        self.trained = {name: p for name, p in self.model.unet.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = DDIM(self.model.scheduler.with_name("ddim"), config.steps, eta=1.0)
        self.times_S = torch.tensor(self.scheduler.timesteps, dtype=torch.float32, device=self.device)
        self.empty_ME = self.model.encode_prompts([""])[0]
        self.statistics = PromptStatistics(config.statistics_buffer, config.statistics_min_count)
        self.iteration = 0

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], generator: torch.Generator) -> tuple[Rollout, Tensor]:
        """Draw an image for each prompt. Returns its steps, and the images (B, C, H, W) in [0, 1]."""
        unet = self.model.unet.config
        if unet.sample_size is None:
            raise UserError(f"{self.folder}/unet/config.json: names no sample_size")
        contexts_BME = self.model.encode_prompts(prompts)
        shape = (len(prompts), unet.in_channels, unet.sample_size, unet.sample_size)
        # All noise at once: it is drawn on the CPU, and each trip to the GPU would wait for the steps before.
        x_BZhw, *noises = draw_noise((1 + len(self.scheduler.timesteps), *shape), generator, self.device)
        latents, log_probs = [x_BZhw], []
        for i in range(len(self.scheduler.timesteps)):
            ((mean_BZhw, std),) = self._step(x_BZhw[None], range(i, i + 1), contexts_BME)
            x_BZhw = mean_BZhw + std * noises[i] if std else mean_BZhw
            latents.append(x_BZhw)
            log_probs.append(gaussian_log_prob(x_BZhw, mean_BZhw, std) if std else torch.zeros_like(x_BZhw[:, 0, 0, 0]))
        rollout = Rollout(list(prompts), contexts_BME, torch.stack(latents, 1), torch.stack(log_probs, 1))
        return rollout, self.model.decode_latents(x_BZhw)

    def update(self, rollout: Rollout, rewards: np.ndarray) -> dict[str, float]:
        """The iteration's steps of the optimizer: every kept step of every image is used once.

        Raises UserError if the gradient is not finite.
        """
        config = self.config
        advantages = self.statistics.advantages(rollout.prompts, rewards).clip(
            -config.advantage_clip, config.advantage_clip
        )
        advantages_N = torch.as_tensor(advantages, dtype=torch.float32, device=self.device)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "update", self.iteration))
        order_N = torch.randperm(len(advantages_N), generator=generator).to(self.device)
        steps = self._stochastic_steps()
        sums: dict[str, Tensor] = {}
        for share in order_N.chunk(config.updates):
            for picked_B in share.split(config.batch_size):
                for at in range(0, len(steps), config.steps_at_once):
                    together = steps[at : at + config.steps_at_once]
                    loss, figures = self._loss(rollout, picked_B, together, advantages_N[picked_B])
                    weight = len(together) * len(picked_B) / (len(steps) * len(share))
                    (loss * weight).backward()
                    for name, value in figures.items():
                        sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value * weight
            grad_norm = float(clip_grad_norm_(self.trained.values(), config.max_grad_norm))
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"the gradient is not finite in iteration {self.iteration + 1}: the last checkpoint is good; try a "
                    "lower --lr"
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.iteration += 1
        means = {name: float(value) / config.updates for name, value in sums.items()}
        return means | {"train/grad_norm": grad_norm}  # of the last update

    def log_probs(self, rollout: Rollout, picked_B: Tensor, steps: range) -> Tensor:
        """Of these steps of the picked images, (G, B), under the policy as it is now, in one pass of the network."""
        latents_SBZhw = rollout.latents_NSZhw[picked_B].transpose(0, 1)
        policies = self._step(latents_SBZhw[steps.start : steps.stop], steps, rollout.contexts_NME[picked_B])
        after_GBZhw = latents_SBZhw[steps.start + 1 : steps.stop + 1]
        return torch.stack(
            [gaussian_log_prob(x, mean, std) for x, (mean, std) in zip(after_GBZhw, policies, strict=True)]
        )

    def _loss(
        self, rollout: Rollout, picked_B: Tensor, steps: range, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = StepBatch(
            self.log_probs(rollout, picked_B, steps).flatten(),
            rollout.log_probs_NS[picked_B, steps.start : steps.stop].T.flatten(),
            advantages_B.repeat(len(steps)),
        )
        if self.config.estimator == "sf":
            loss = score_function_loss(batch)
        else:
            loss = importance_sampling_loss(batch, self.config.clip_range)
        return loss, {"train/loss": loss.detach(), **policy_change(batch, self.config.clip_range)}

    def _step(self, x_GBZhw: Tensor, steps: range, contexts_BME: Tensor) -> list[tuple[Tensor, float]]:
        """Mean (B, Z, h, w) and standard deviation of what follows each step: the policy, guidance included."""
        count, images = x_GBZhw.shape[:2]
        contexts_GBME = contexts_BME.repeat(count, 1, 1)
        # Without autocast's cache: a graph would hold the casts of the weights as they are now.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16", cache_enabled=False
        ):
            prediction = guided_prediction(
                self.denoiser,
                x_GBZhw.flatten(0, 1),
                self.times_S[steps.start : steps.stop].repeat_interleave(images),
                contexts_GBME,
                self.empty_ME.expand_as(contexts_GBME),
                self.config.guidance,
            )
        predictions = prediction.chunk(count)
        return [self.scheduler.mean_and_std(predictions[k], i, x_GBZhw[k]) for k, i in enumerate(steps)]

    def _stochastic_steps(self) -> range:
        """Steps with a probability to speak of: with `set_alpha_to_one` the last step adds no noise."""
        last = len(self.scheduler.timesteps) - 1
        return range(last + (self.scheduler.std(last) > 0))

    def save(self, folder: Path) -> None:
        """The adapters, or the whole model if it was trained whole."""
        if self.config.lora_r:
            save_lora(self.model.unet, folder)
        else:
            save_folder(self.model, folder)

    def state(self) -> dict[str, Any]:
        return {
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "statistics": self.statistics.state(),
            "iteration": self.iteration,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of other adapters or of another model."""
        saved = {name: list(tensor.shape) for name, tensor in state["trained"].items()}
        if saved != {name: list(parameter.shape) for name, parameter in self.trained.items()}:
            raise UserError(f"the checkpoint's weights are not those that {self.folder} with --lora-r "
                            f"{self.config.lora_r} trains")  # fmt: skip
        self.load_weights(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state(state["statistics"])
        self.iteration = state["iteration"]

    def weights(self) -> dict[str, np.ndarray]:
        """A copy of what is trained, for `load_weights` of another learner."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
