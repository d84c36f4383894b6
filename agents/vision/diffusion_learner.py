"""The two learners of latent diffusion: networks, optimizers, counters, and one update of each.

Shapes: N images in all, B in a batch, C channels, H × W pixels, Z latent channels, h × w latent pixels, M tokens.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from agents.vision.diffusion_config import LearningConfig, NetworkConfig
from models.diffusion.autoencoder import Autoencoder, Posterior
from models.diffusion.noise_schedule import NoiseSchedule, SchedulerConfig
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.tokenizer import PromptTokenizer
from models.diffusion.unet import UNet
from models.errors import UserError
from models.seeding import derive_seed

_CHUNK = 128  # images to a pass that only evaluates


class AutoencoderLearner:
    """Minimises the mean absolute error of the pixels plus a little KL divergence (Rombach et al., section 3.1).

    The paper adds a perceptual and an adversarial loss, which keep the texture of photographs; neither is here.
    """

    def __init__(self, network: NetworkConfig, learning: LearningConfig, seed: int, device: str) -> None:
        self.learning, self.seed, self.device = learning, seed, torch.device(device)
        self.model = seeded(lambda: Autoencoder(network.autoencoder()), seed, "autoencoder").to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, learning.autoencoder_lr, learning)
        self._encode = compiled(self.model.encode, learning)
        self._decode = compiled(self.model.decode, learning)
        self.step = 0

    def update(self, images_NHWC: Tensor, want_metrics: bool) -> dict[str, float]:
        """One step on a batch drawn from all images (uint8). Raises UserError if the loss is not finite."""
        learning = self.learning
        seed = derive_seed(self.seed, "autoencoder step", self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (learning.autoencoder_batch_size,)
        picked_B = torch.randint(len(images_NHWC), size, generator=generator, device=self.device)
        x_BCHW = self._pixels(images_NHWC[picked_B.to(images_NHWC.device)])
        with mixed_precision(self.device):
            half = self._encode(x_BCHW)
            posterior = Posterior(half.mean_BZhw.float(), half.log_variance_BZhw.float())
            rebuilt_BCHW = self._decode(posterior.sample(generator))
        error = (rebuilt_BCHW.float() - x_BCHW).abs().mean()
        kl = posterior.kl().mean()
        set_lr(self.optimizer, learning.autoencoder_lr, self.step, learning.autoencoder_steps, learning.warmup)
        norm = optimize(self.optimizer, error + learning.kl_weight * kl, learning.max_grad_norm)
        self.step += 1
        if not want_metrics:
            return {}
        figures = {"autoencoder/error": error, "autoencoder/kl": kl, "autoencoder/grad_norm": norm}
        return finite({name: value.item() for name, value in figures.items()}, "--learning.autoencoder-lr")

    @torch.no_grad()
    def evaluate(self, images_NHWC: Tensor) -> tuple[dict[str, float], np.ndarray]:
        """Peak signal-to-noise ratio of held-out images in dB, and what becomes of the first of them (uint8)."""
        squared, rebuilt = [], []
        for chunk_BHWC in images_NHWC.split(_CHUNK):
            x_BCHW = self._pixels(chunk_BHWC)
            y_BCHW = self.model.decode(self.model.encode(x_BCHW).mean_BZhw).clamp(-1, 1)
            squared.append(((y_BCHW - x_BCHW) / 2).square().mean(dim=(1, 2, 3)))
            rebuilt.append(((y_BCHW + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1))
        psnr = -10 * torch.cat(squared).mean().log10()
        return finite({"eval/psnr": psnr.item()}, "--learning.autoencoder-lr"), torch.cat(rebuilt).cpu().numpy()

    @torch.no_grad()
    def set_scale(self, images_NHWC: Tensor) -> None:
        """Have the latents of the first images unit variance (Rombach et al., appendix G)."""
        posterior = self.model.encode(self._pixels(images_NHWC[:1024]))
        variance = posterior.mean_BZhw.var() + posterior.log_variance_BZhw.exp().mean()
        self._rescale(1 / math.sqrt(variance.item()))

    @torch.no_grad()
    def encode_all(self, images_NHWC: Tensor) -> Posterior:
        """The posterior of every image, unscaled, on the device."""
        parts = [self.model.encode(self._pixels(chunk_BHWC)) for chunk_BHWC in images_NHWC.split(_CHUNK)]
        means, log_variances = (
            torch.cat(tensors) for tensors in zip(*((p.mean_BZhw, p.log_variance_BZhw) for p in parts))
        )
        # The latents as the denoiser is to know them: a scaled normal distribution is one again.
        scale = self.model.config.scaling_factor
        return Posterior(means * scale, log_variances + 2 * math.log(scale))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaling_factor": self.model.config.scaling_factor,
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of other network sizes."""
        load_weights(self.model, state["model"], "--network.autoencoder-...")
        load_optimizer(self.optimizer, state["optimizer"])
        self._rescale(state["scaling_factor"])
        self.step = state["step"]

    def _rescale(self, factor: float) -> None:
        self.model.config = replace(self.model.config, scaling_factor=factor)

    def _pixels(self, images_BHWC: Tensor) -> Tensor:
        return images_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1


class TextToLatent(nn.Module):
    """What is trained together: the denoiser and the text encoder."""

    def __init__(self, network: NetworkConfig, sample_size: int) -> None:
        super().__init__()
        self.unet = UNet(network.unet(sample_size))
        self.text_encoder = TextEncoder(network.text_encoder())
        # As CLIP's: an embedding of norm 1 would drown what the first layers add.
        for embedding in (
            self.text_encoder.embeddings.token_embedding,
            self.text_encoder.embeddings.position_embedding,
        ):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x_BZhw: Tensor, time_B: Tensor, tokens_BM: Tensor) -> Tensor:
        return self.unet(x_BZhw, time_B, self.text_encoder(tokens_BM))


class DenoiserLearner:
    """Minimises E‖target − prediction(x_t, t, caption)‖² (Ho et al. 2020, eq. 14; Rombach et al., eq. 3)."""

    def __init__(
        self, network: NetworkConfig, learning: LearningConfig, tokenizer: PromptTokenizer, sample_size: int, seed: int,
        device: str,
    ) -> None:  # fmt: skip
        self.learning, self.seed, self.device = learning, seed, torch.device(device)
        self.model = seeded(lambda: TextToLatent(network, sample_size), seed, "denoiser").to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
        self._averaging = list(self.averaged.parameters()), list(self.model.parameters())
        self._predict = compiled(self.model, learning)
        self.optimizer = make_optimizer(self.model, learning.lr, learning)
        self.scheduler = replace(SchedulerConfig.sd_v1("dpm++"), prediction_type=network.prediction_type)
        self.schedule = NoiseSchedule(self.scheduler)
        self.empty_M = tokenizer([""])[0].to(self.device)
        self.step = 0

    def update(self, latents: Posterior, tokens_NM: Tensor, want_metrics: bool) -> dict[str, float]:
        """One step on a batch drawn from all latents and their captions. Raises UserError if the loss is not finite."""
        learning = self.learning
        seed = derive_seed(self.seed, "denoiser step", self.step)
        generator = torch.Generator(self.device).manual_seed(seed)
        picked_B = torch.randint(len(tokens_NM), (learning.batch_size,), generator=generator, device=self.device)
        dropped_B = torch.rand(learning.batch_size, generator=generator, device=self.device) < learning.caption_dropout
        tokens_BM = torch.where(dropped_B[:, None], self.empty_M, tokens_NM[picked_B])
        loss = self._loss(self._predict, latents, picked_B, tokens_BM, generator)
        set_lr(self.optimizer, learning.lr, self.step, learning.steps, learning.warmup)
        norm = optimize(self.optimizer, loss, learning.max_grad_norm)
        # Early on, an average over 1/(1 − ema) steps would still hold the first weights.
        keep = min(learning.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(*self._averaging, 1 - keep)
        self.step += 1
        if not want_metrics:
            return {}
        figures = {"train/denoising_loss": loss.item(), "train/grad_norm": norm.item()}
        return finite(figures, "--learning.lr")

    @torch.no_grad()
    def evaluate(self, latents: Posterior, tokens_NM: Tensor) -> dict[str, float]:
        """The averaged weights on held-out images: noise and timesteps are the same each time."""
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "evaluation"))
        everything = torch.arange(len(tokens_NM), device=self.device).split(_CHUNK)
        losses = [
            self._loss(self.averaged, latents, picked_B, tokens_NM[picked_B], generator) * len(picked_B)
            for picked_B in everything
        ]
        return finite({"eval/denoising_loss": torch.stack(losses).sum().item() / len(tokens_NM)}, "--learning.lr")

    def _loss(
        self,
        predict: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Posterior,
        picked_B: Tensor,
        tokens_BM: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        posterior = Posterior(latents.mean_BZhw[picked_B], latents.log_variance_BZhw[picked_B])
        x0_BZhw = posterior.sample(generator)
        noise_BZhw = torch.randn(x0_BZhw.shape, generator=generator, device=self.device)
        steps = self.scheduler.num_train_timesteps
        time_B = torch.randint(steps, (len(picked_B),), generator=generator, device=self.device)
        x_BZhw = self.schedule.add_noise(x0_BZhw, noise_BZhw, time_B)
        with mixed_precision(self.device):
            prediction_BZhw = predict(x_BZhw, time_B, tokens_BM)
        return F.mse_loss(prediction_BZhw.float(), self.schedule.target(x0_BZhw, noise_BZhw, time_B))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of other network sizes."""
        load_weights(self.model, state["model"], "--network....")
        load_weights(self.averaged, state["averaged"], "--network....")
        load_optimizer(self.optimizer, state["optimizer"])
        self.step = state["step"]


def seeded(build: Any, seed: int, name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights", name))
        return build()


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where there are tensor cores for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Any, learning: LearningConfig) -> Any:
    mode = "reduce-overhead" if learning.cuda_graphs else None
    return torch.compile(function, mode=mode) if learning.compile else function


def make_optimizer(model: nn.Module, lr: float, learning: LearningConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=learning.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    rising = min(1.0, (step + 1) / max(1, warmup))
    optimizer.param_groups[0]["lr"] = peak * rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> Tensor:
    """One step; returns the norm of the gradient before it was clipped."""
    loss.backward()
    norm = clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()  # CUDA graphs write the next gradients where these lie
    return norm


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:  # to lie in memory as the parameter does: fused AdamW needs it
                moments[name] = torch.empty_like(parameter).copy_(value)


def finite(figures: dict[str, float], flag: str) -> dict[str, float]:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is not finite: the last checkpoint is good; try a lower {flag}")
    return figures


def load_weights(model: nn.Module, weights: dict[str, Tensor], flags: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's network is not that of {flags}: {error}") from error
