"""Networks small enough for a test that keep every structural element, in our code and in the reference's."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from models.diffusion.autoencoder import Autoencoder
from models.diffusion.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from models.diffusion.noise_schedule import SchedulerConfig
from models.diffusion.pipeline import LatentDiffusion
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.tokenizer import PromptTokenizer, train_tokenizer
from models.diffusion.unet import UNet

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TEXT: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter, so that norms and biases do not hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def unets() -> tuple[UNet, UNet2DConditionModel]:
    """The same weights at every call."""
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**UNET).eval()
    perturb(reference)
    ours = UNet(UNetConfig(**UNET))
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def autoencoders() -> tuple[Autoencoder, AutoencoderKL]:
    reference = AutoencoderKL(
        **AUTOENCODER, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    ).eval()
    perturb(reference)
    ours = Autoencoder(AutoencoderConfig(**AUTOENCODER))
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def text_encoders(**changes: Any) -> tuple[TextEncoder, CLIPTextModel]:
    settings = {**TEXT, **changes}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    reference = CLIPTextModel(CLIPTextConfig(**settings, **tokens)).eval()
    perturb(reference)
    ours = TextEncoder(TextEncoderConfig(**settings))
    ours.load_state_dict(reference.state_dict())
    return ours, reference


CAPTIONS = ("a red circle above a blue square", "two green triangles", "the digit 7 beside a yellow circle")


def tokenizer() -> PromptTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=TEXT["vocab_size"], length=TEXT["max_position_embeddings"])


def latent_diffusion(scheduler: str = "pndm") -> LatentDiffusion:
    """The same weights at every call. 64 × 64 pixels."""
    return _assemble(AutoencoderConfig(**AUTOENCODER), UNetConfig(**UNET), scheduler)


def tiny_latent_diffusion() -> LatentDiffusion:
    """For training: two levels each, 16 × 16 pixels."""
    autoencoder = AUTOENCODER | {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16}
    unet = UNET | {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    return _assemble(AutoencoderConfig(**autoencoder), UNetConfig(**unet), "ddim")


def _assemble(autoencoder: AutoencoderConfig, unet: UNetConfig, scheduler: str) -> LatentDiffusion:
    torch.manual_seed(0)
    parts = (
        Autoencoder(autoencoder),
        UNet(unet),
        TextEncoder(TextEncoderConfig(**TEXT)),
    )
    for seed, part in enumerate(parts):
        perturb(part.eval().requires_grad_(False), seed)
    return LatentDiffusion(*parts, tokenizer(), SchedulerConfig.sd_v1(scheduler))
