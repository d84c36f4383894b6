"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020), whose hidden states condition the denoiser.

Shapes: B prompts, M tokens, E width, N heads, K width of a head. Parameter names are those of transformers'
CLIPTextModel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.config import TextEncoderConfig


class TextEncoder(nn.Module):
    """Token ids (B, M) to hidden states (B, M, E), after the final layer norm. Causal; padding is not masked."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, tokens_BM: Tensor) -> Tensor:
        x_BME = self.embeddings(tokens_BM)
        for layer in self.encoder["layers"].children():
            x_BME = layer(x_BME)
        return self.final_layer_norm(x_BME)


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens_BM: Tensor) -> Tensor:
        positions_M = torch.arange(tokens_BM.shape[1], device=tokens_BM.device)
        return self.token_embedding(tokens_BM) + self.position_embedding(positions_M)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_BME: Tensor) -> Tensor:
        x_BME = x_BME + self.self_attn(self.layer_norm1(x_BME))
        return x_BME + self.mlp(self.layer_norm2(x_BME))


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BME: Tensor) -> Tensor:
        q_BNMK, k_BNMK, v_BNMK = (
            projection(x_BME).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BNMK = F.scaled_dot_product_attention(q_BNMK, k_BNMK, v_BNMK, is_causal=True)
        return self.out_proj(y_BNMK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self._quick = config.hidden_act == "quick_gelu"

    def forward(self, x_BME: Tensor) -> Tensor:
        h = self.fc1(x_BME)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self._quick else F.gelu(h))
