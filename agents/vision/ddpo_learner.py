"""The policy of DDPO: a diffusion model that keeps its steps when it samples, and learns from them.

Shapes: S denoising steps, B images in a batch, N in a rollout, Z latent channels, h × w latent pixels, M tokens of E.
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
from models.diffusion.folder import load_folder, save_folder
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


class DDPOLearner:
    """Model, optimizer, statistics and counter. Raises UserError for a model folder that cannot be loaded."""

    def __init__(self, config: "DDPOConfig", seed: int, device: str) -> None:
        if not config.model.parts:
            raise UserError("--model is missing: give the Stable Diffusion folder to tune")
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.model = load_folder(config.model, device=device)
        if config.lora_r:
            lora = LoraConfig(config.lora_r, float(config.lora_r), config.lora_targets)
            attach_lora(self.model.unet, lora, derive_seed(seed, "lora"))
        else:
            self.model.unet.requires_grad_(True)
        self.trained = {name: p for name, p in self.model.unet.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = DDIM(self.model.scheduler.with_name("ddim"), config.steps, eta=1.0)
        self.empty_ME = self.model.encode_prompts([""])[0]
        self.statistics = PromptStatistics(config.statistics_buffer, config.statistics_min_count)
        self.iteration = 0

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], generator: torch.Generator) -> tuple[Rollout, Tensor]:
        """Draw an image for each prompt. Returns its steps, and the images (B, C, H, W) in [0, 1]."""
        unet = self.model.unet.config
        if unet.sample_size is None:
            raise UserError(f"{self.config.model}/unet/config.json: names no sample_size")
        contexts_BME = self.model.encode_prompts(prompts)
        shape = (len(prompts), unet.in_channels, unet.sample_size, unet.sample_size)
        # All noise at once: it is drawn on the CPU, and each trip to the GPU would wait for the steps before.
        x_BZhw, *noises = draw_noise((1 + len(self.scheduler.timesteps), *shape), generator, self.device)
        latents, log_probs = [x_BZhw], []
        for i in range(len(self.scheduler.timesteps)):
            mean_BZhw, std = self._step(x_BZhw, i, contexts_BME)
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
        sums: dict[str, Tensor] = {}
        for share in order_N.chunk(config.updates):
            batches = share.split(config.batch_size)
            for picked_B in batches:
                for i in self._stochastic_steps():
                    loss, figures = self._loss(rollout, picked_B, i, advantages_N[picked_B])
                    (loss / (len(batches) * len(self._stochastic_steps()))).backward()
                    for name, value in figures.items():
                        sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
            grad_norm = float(clip_grad_norm_(self.trained.values(), config.max_grad_norm))
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"the gradient is not finite in iteration {self.iteration + 1}: the last checkpoint is good; try a "
                    "lower --lr"
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.iteration += 1
        passes = len(order_N) // config.batch_size * len(self._stochastic_steps())
        means = {name: float(value) / passes for name, value in sums.items()}
        return means | {"train/grad_norm": grad_norm}  # of the last update

    def log_probs(self, rollout: Rollout, picked_B: Tensor, i: int) -> Tensor:
        """Of step i of the picked images, (B,), under the policy as it is now."""
        mean_BZhw, std = self._step(rollout.latents_NSZhw[picked_B, i], i, rollout.contexts_NME[picked_B])
        return gaussian_log_prob(rollout.latents_NSZhw[picked_B, i + 1], mean_BZhw, std)

    def _loss(
        self, rollout: Rollout, picked_B: Tensor, i: int, advantages_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old_log_probs_B = rollout.log_probs_NS[picked_B, i]
        batch = StepBatch(self.log_probs(rollout, picked_B, i), old_log_probs_B, advantages_B)
        if self.config.estimator == "sf":
            loss = score_function_loss(batch)
        else:
            loss = importance_sampling_loss(batch, self.config.clip_range)
        return loss, {"train/loss": loss.detach(), **policy_change(batch, self.config.clip_range)}

    def _step(self, x_BZhw: Tensor, i: int, contexts_BME: Tensor) -> tuple[Tensor, float]:
        """Mean and standard deviation of the next latent: the policy, guidance included."""
        empty_BME = self.empty_ME.expand_as(contexts_BME)
        time = self.scheduler.timesteps[i]
        prediction_BZhw = guided_prediction(
            self.model.unet, x_BZhw, time, contexts_BME, empty_BME, self.config.guidance
        )
        return self.scheduler.mean_and_std(prediction_BZhw, i, x_BZhw)

    def _stochastic_steps(self) -> list[int]:
        """Steps with a probability to speak of: with `set_alpha_to_one` the last step adds no noise."""
        return [i for i in range(len(self.scheduler.timesteps)) if self.scheduler.std(i) > 0]

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
            raise UserError(f"the checkpoint's weights are not those that {self.config.model} with --lora-r "
                            f"{self.config.lora_r} trains")  # fmt: skip
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state(state["statistics"])
        self.iteration = state["iteration"]
