"""Sizes of latent diffusion's networks, and how they learn."""

from dataclasses import dataclass
from typing import Literal

from models.diffusion.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from models.errors import UserError

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
        # Nothing else looks at these two before the autoencoder is trained.
        if self.text_width % self.heads:
            raise UserError(
                f"--network.text-width is {self.text_width}: give a multiple of --network.heads {self.heads}"
            )
        if self.prompt_length < 2:
            raise UserError(f"--network.prompt-length is {self.prompt_length}: start and end are 2 tokens already")

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
    compile: bool = False
    """Compile the networks for the GPU."""
    cuda_graphs: bool = False
    """Replay what was compiled as CUDA graphs, for networks whose kernels are shorter than their launches."""

    def __post_init__(self) -> None:
        if self.cuda_graphs and not self.compile:
            raise UserError("--learning.cuda-graphs needs --learning.compile")
        for name, value in vars(self).items():
            flag = f"--learning.{name.replace('_', '-')} is {value}"
            if isinstance(value, bool):
                continue
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
