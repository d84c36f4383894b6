"""The two learners of latent diffusion: networks, optimizers, counters, and one update of each.

Shapes: N images in all, B in a batch, C channels, H × W pixels, Z latent channels, h × w latent pixels, M tokens.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from models.diffusion.autoencoder import Autoencoder, Posterior
from models.diffusion.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from models.diffusion.noise_schedule import NoiseSchedule, SchedulerConfig
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.tokenizer import PromptTokenizer
from models.diffusion.unet import UNet
from models.errors import UserError
from models.seeding import derive_seed

_CHUNK = 128  # images to a pass that only evaluates
_GROUPS = 16


@dataclass(frozen=True)
class NetworkConfig:
    autoencoder_widths: tuple[int, ...] = (32, 64, 128, 128)
    """Channels at each resolution, multiples of 16; each after the first halves it, so four are `f8`."""
    autoencoder_layers: int = 1
    unet_widths: tuple[int, ...] = (64, 96, 128)
    unet_layers: int = 1
    heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    vocab_size: int = 1024
    """Tokens of the byte-pair vocabulary that is learned from the captions."""
    prompt_length: int = 64
    """Tokens of a caption, start and end included; longer ones are cut."""
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What the denoiser predicts: the noise, or the velocity, which weighs noisy latents more."""

    def __post_init__(self) -> None:
        for name in ("autoencoder_widths", "unet_widths"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1 or any(width % _GROUPS for width in widths):
                raise UserError(f"--network.{name.replace('_', '-')} is {widths}: give multiples of {_GROUPS}")
        for name in ("autoencoder_layers", "unet_layers", "heads", "text_width", "text_layers", "prompt_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--network.{name.replace('_', '-')} is {getattr(self, name)}: must be positive")
        self.unet(1).check("--network")

    def autoencoder(self) -> AutoencoderConfig:
        return AutoencoderConfig(
            block_out_channels=self.autoencoder_widths,
            layers_per_block=self.autoencoder_layers,
            norm_num_groups=_GROUPS,
        )

    def unet(self, sample_size: int) -> UNetConfig:
        attending = len(self.unet_widths) - 1
        return UNetConfig(
            sample_size=sample_size,
            block_out_channels=self.unet_widths,
            down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
            layers_per_block=self.unet_layers,
            cross_attention_dim=self.text_width,
            attention_head_dim=self.heads,
            norm_num_groups=_GROUPS,
        )

    def text_encoder(self) -> TextEncoderConfig:
        return TextEncoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_width,
            intermediate_size=4 * self.text_width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.prompt_length,
        )


@dataclass(frozen=True)
class LearningConfig:
    autoencoder_steps: int = 2000
    autoencoder_batch_size: int = 32
    autoencoder_lr: float = 1e-3
    kl_weight: float = 1e-6
    """Of the KL divergence of a latent (summed over its numbers) beside the mean absolute error of the pixels."""
    steps: int = 10_000
    """Of the denoiser."""
    batch_size: int = 64
    lr: float = 5e-4
    """Of Adam with decoupled weight decay; rising at first, then falling to 0 along a cosine, as the autoencoder's."""
    warmup: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema: float = 0.999
    """Share of the averaged weights that each step keeps."""
    caption_dropout: float = 0.1
    """Share of the captions that are replaced by the empty one: guidance needs a denoiser that knows it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            flag = f"--learning.{name.replace('_', '-')} is {value}"
            if name in ("ema", "caption_dropout"):
                if not 0 <= value < 1:
                    raise UserError(f"{flag}: must be at least 0 and less than 1")
            elif name in ("kl_weight", "weight_decay", "warmup"):
                if value < 0:
                    raise UserError(f"{flag}: must not be negative")
            elif value <= 0:
                raise UserError(f"{flag}: must be positive")

    @property
    def total_steps(self) -> int:
        return self.autoencoder_steps + self.steps


class AutoencoderLearner:
    """Minimises the mean absolute error of the pixels plus a little KL divergence (Rombach et al., section 3.1).

    The paper adds a perceptual and an adversarial loss, which keep the texture of photographs; neither is here.
    """

    def __init__(self, network: NetworkConfig, learning: LearningConfig, seed: int, device: str) -> None:
        self.learning, self.seed, self.device = learning, seed, torch.device(device)
        self.model = seeded(lambda: Autoencoder(network.autoencoder()), seed, "autoencoder").to(self.device)
        self.optimizer = make_optimizer(self.model, learning.autoencoder_lr, learning)
        self.step = 0

    def update(self, images_NHWC: Tensor, want_metrics: bool) -> dict[str, float]:
        """One step on a batch drawn from all images (uint8). Raises UserError if the loss is not finite."""
        learning = self.learning
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "autoencoder step", self.step))
        picked_B = torch.randint(len(images_NHWC), (learning.autoencoder_batch_size,), generator=generator)
        x_BCHW = self._pixels(images_NHWC[picked_B])
        with mixed_precision(self.device):
            half = self.model.encode(x_BCHW)
            posterior = Posterior(half.mean_BZhw.float(), half.log_variance_BZhw.float())
            rebuilt_BCHW = self.model.decode(posterior.sample(generator))
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
        self.optimizer.load_state_dict(state["optimizer"])
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
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval()
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
        loss = self._loss(self.model, latents, picked_B, tokens_BM, generator)
        set_lr(self.optimizer, learning.lr, self.step, learning.steps, learning.warmup)
        norm = optimize(self.optimizer, loss, learning.max_grad_norm)
        # Early on, an average over 1/(1 − ema) steps would still hold the first weights.
        keep = min(learning.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - keep)
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
        self, model: TextToLatent, latents: Posterior, picked_B: Tensor, tokens_BM: Tensor, generator: torch.Generator
    ) -> Tensor:
        posterior = Posterior(latents.mean_BZhw[picked_B], latents.log_variance_BZhw[picked_B])
        x0_BZhw = posterior.sample(generator)
        noise_BZhw = torch.randn(x0_BZhw.shape, generator=generator, device=self.device)
        steps = self.scheduler.num_train_timesteps
        time_B = torch.randint(steps, (len(picked_B),), generator=generator, device=self.device)
        x_BZhw = self.schedule.add_noise(x0_BZhw, noise_BZhw, time_B)
        with mixed_precision(self.device):
            prediction_BZhw = model(x_BZhw, time_B, tokens_BM)
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def seeded(build: Any, seed: int, name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial weights", name))
        return build()


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where there are tensor cores for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_optimizer(model: nn.Module, lr: float, learning: LearningConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=learning.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    rising = min(1.0, (step + 1) / max(1, warmup))
    optimizer.param_groups[0]["lr"] = peak * rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> Tensor:
    """One step; returns the norm of the gradient before it was clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    optimizer.step()
    return norm


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
