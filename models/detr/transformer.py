"""DETR's transformer: post-norm, positions added to queries and keys of every attention, never to values.

B images, K tokens of the feature map, Q object queries, D width, N heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detr.config import DetrConfig


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`: query, key and value stacked in one."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, query_BQD: Tensor, key_BKD: Tensor, value_BKD: Tensor, valid_B11K: Tensor | None = None
    ) -> Tensor:
        """valid_B11K: False at keys that nobody may attend to; None where all are valid. Returns (B, Q, D)."""
        dim = query_BQD.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query_BQD is key_BKD:  # self-attention: one product for both
            query_BQD, key_BKD = F.linear(query_BQD, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, -1)
        else:
            query_BQD = F.linear(query_BQD, weight[:dim], bias[:dim])
            key_BKD = F.linear(key_BKD, weight[dim : 2 * dim], bias[dim : 2 * dim])
        value_BKD = F.linear(value_BKD, weight[2 * dim :], bias[2 * dim :])
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query_BQD, key_BKD, value_BKD))
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, valid_B11K, dropout).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.self_attn = Attention(dim, config.encoder_attention_heads, config.attention_dropout)
        self.linear1 = nn.Linear(dim, config.encoder_ffn_dim)
        self.linear2 = nn.Linear(config.encoder_ffn_dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.inner_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)

    def forward(self, x_BKD: Tensor, position_BKD: Tensor, valid_B11K: Tensor | None) -> Tensor:
        placed_BKD = x_BKD + position_BKD
        x_BKD = self.norm1(x_BKD + self.dropout(self.self_attn(placed_BKD, placed_BKD, x_BKD, valid_B11K)))
        inner = self.inner_dropout(F.relu(self.linear1(x_BKD)))
        return self.norm2(x_BKD + self.dropout(self.linear2(inner)))


class DecoderLayer(nn.Module):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        dim, heads = config.d_model, config.decoder_attention_heads
        self.self_attn = Attention(dim, heads, config.attention_dropout)
        self.multihead_attn = Attention(dim, heads, config.attention_dropout)
        self.linear1 = nn.Linear(dim, config.decoder_ffn_dim)
        self.linear2 = nn.Linear(config.decoder_ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout, self.inner_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)

    def forward(
        self,
        x_BQD: Tensor,
        memory_BKD: Tensor,
        placed_memory_BKD: Tensor,
        query_position_QD: Tensor,
        valid_B11K: Tensor | None,
    ) -> Tensor:
        placed_BQD = x_BQD + query_position_QD
        x_BQD = self.norm1(x_BQD + self.dropout(self.self_attn(placed_BQD, placed_BQD, x_BQD)))
        placed_BQD = x_BQD + query_position_QD
        seen_BQD = self.multihead_attn(placed_BQD, placed_memory_BKD, memory_BKD, valid_B11K)
        x_BQD = self.norm2(x_BQD + self.dropout(seen_BQD))
        inner = self.inner_dropout(F.relu(self.linear1(x_BQD)))
        return self.norm3(x_BQD + self.dropout(self.linear2(inner)))


class Encoder(nn.Module):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, x_BKD: Tensor, position_BKD: Tensor, valid_B11K: Tensor | None) -> Tensor:
        for layer in self.layers:
            x_BKD = layer(x_BKD, position_BKD, valid_B11K)
        return x_BKD


class Decoder(nn.Module):
    """One norm serves the output of every layer; what the next layer receives is not normed by it."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, memory_BKD: Tensor, position_BKD: Tensor, query_position_QD: Tensor, valid_B11K: Tensor | None
    ) -> Tensor:
        """Returns the normed outputs of all layers (L, B, Q, D)."""
        x_BQD = torch.zeros_like(query_position_QD).expand(len(memory_BKD), -1, -1)
        placed_memory_BKD = memory_BKD + position_BKD
        outputs = []
        for layer in self.layers:
            x_BQD = layer(x_BQD, memory_BKD, placed_memory_BKD, query_position_QD, valid_B11K)
            outputs.append(self.norm(x_BQD))
        return torch.stack(outputs)


class Transformer(nn.Module):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, x_BKD: Tensor, position_BKD: Tensor, query_position_QD: Tensor, valid_BK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the decoder's outputs (L, B, Q, D) and the encoder's (B, K, D)."""
        valid_B11K = None if valid_BK is None else valid_BK[:, None, None]
        memory_BKD = self.encoder(x_BKD, position_BKD, valid_B11K)
        return self.decoder(memory_BKD, position_BKD, query_position_QD, valid_B11K), memory_BKD
