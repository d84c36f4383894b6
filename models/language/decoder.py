"""The decoder: a pre-norm transformer whose layers choose their sequence mixer and their feed-forward by config."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.cache import Cache, LayerCache
from models.language.config import LanguageConfig
from models.language.gated_attention_unit import GatedAttentionUnit
from models.language.kernel_attention import PerformerAttention
from models.language.linear_attention import Decay
from models.language.mixers import MIXERS
from models.language.mlp import DenseMLP
from models.language.moe import MixtureOfExperts
from models.language.norm import RMSNorm
from models.language.packing import Packing
from models.language.rope import inverse_frequencies, rotation
from models.language.router import Router, RouterTrace


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MIXERS[config.mixer_kind(layer)](config)
        self.has_mlp = config.has_mlp(layer)
        if not self.has_mlp:
            return
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe(layer)
        self.mlp = MixtureOfExperts(config) if self.is_moe else DenseMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_TD: Tensor,
        packing: Packing,
        cos_sin: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        trace: RouterTrace | None,
    ) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), packing, cos_sin, cache)
        if not self.has_mlp:
            return x_TD
        h_TD = self.post_attention_layernorm(x_TD)
        return x_TD + (self.mlp(h_TD, trace) if self.is_moe else self.mlp(h_TD))


class Decoder(nn.Module):
    """Construction leaves weights undefined: call `init_weights`, or load a checkpoint.

    Parameter names are those of a Hugging Face checkpoint without its leading "model.".
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config.validate()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope_frequency = inverse_frequencies(config.rope, config.head_dim)

    @property
    def head_weight(self) -> Tensor:
        """The weight that turns hidden states into logits, [V, D]."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens_T: Tensor,
        packing: Packing,
        cache: Cache | None = None,
        trace: RouterTrace | None = None,
    ) -> Tensor:
        """Return the final-normed hidden states, [T, D].

        With a cache the pack continues the cached sequences (`packing.lengths` new tokens each), and the cache
        grows; without one each sequence of the pack stands alone. `trace` receives what the
        routers did, or tells them what to do.
        """
        if cache is not None:
            packing = packing.after(cache.lengths)
            longest = max(start + length for start, length in zip(packing.starts, packing.lengths))
            if longest > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} tokens a sequence, and {longest} were asked for")
        if self.rope_frequency.device != tokens_T.device:
            self.rope_frequency = self.rope_frequency.to(tokens_T.device)
        x_TD = self.embed_tokens(tokens_T)
        cos_sin = rotation(self.rope_frequency, packing.positions_T, x_TD.dtype)
        for i, layer in enumerate(self.layers):
            x_TD = layer(x_TD, packing, cos_sin, None if cache is None else cache.layers[i], trace)
        if cache is not None:
            cache.advance(packing.lengths)
        return self.norm(x_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return F.linear(hidden_TD, self.head_weight)

    def empty_cache(self, batch: int, max_len: int) -> Cache:
        """A cache for `batch` sequences of at most `max_len` tokens."""
        layers = [cast(DecoderLayer, layer).self_attn.empty_cache(batch, max_len) for layer in self.layers]
        return Cache(layers, batch, max_len, self.embed_tokens.weight.device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Decoder":
        """Truncated normal (± 3σ) with σ = `initializer_range`; matrices that write to the residual stream get
        σ / √(2 · layers), so that the stream's variance does not grow with depth (GPT-2). The same seed gives the
        same weights on every device. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
                continue
            sigma = residual_std if "o_proj" in name or "down_proj" in name else std
            value = torch.empty(parameter.shape)
            nn.init.trunc_normal_(value, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)
            parameter.copy_(value)
        for module in self.modules():
            if isinstance(module, (Decay, PerformerAttention, GatedAttentionUnit)):
                module.initialise(generator)
            if isinstance(module, Router) and module.has_bias:
                module.e_score_correction_bias.zero_()
        return self

    def routers(self) -> list[Router]:
        """The routers of the mixture layers, in the order of a trace's records."""
        return [module for module in self.modules() if isinstance(module, Router)]
