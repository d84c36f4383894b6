"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama and Qwen."""

import math

import torch
from torch import Tensor

from models.language.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each channel pair that turns, float32 [head_dim / 2] (less with a partial rotary factor).

    rope_type "llama3" stretches the long wavelengths by `factor`, leaves the short ones, and interpolates between, so
    that a model trained at `original_max_position_embeddings` reads longer contexts (Llama 3.1).
    """
    size = int(head_dim * rope.partial_rotary_factor)
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequency = 1.0 / rope.rope_theta**exponent
    if rope.rope_type == "default":
        return frequency
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # over the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return smooth * frequency + (1 - smooth) * frequency / rope.factor


def rotation(frequency: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each position, [T, 1, pairs] so that they broadcast over heads."""
    angle = positions_T.float()[:, None] * frequency
    return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


def rotate(x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i together with channel i + P, for P pairs; what lies beyond 2P stays."""
    pairs = cos.shape[-1]
    a, b, rest = x_THC.split((pairs, pairs, x_THC.shape[-1] - 2 * pairs), -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
