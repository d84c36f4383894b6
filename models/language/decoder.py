"""The decoder: a transformer whose layers choose their sequence mixer and their feed-forward by config."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from models.language.cache import Cache, LayerCache
from models.language.config import LanguageConfig
from models.language.initialisation import initialise
from models.language.kernel_attention import PerformerAttention
from models.language.mixers import MIXERS
from models.language.mlp import DenseMLP
from models.language.moe import MixtureOfExperts
from models.language.norm import Residual, final_norm, layer_norm
from models.language.packing import Packing
from models.language.parametrisation import head_multiplier
from models.language.rope import inverse_frequencies, rotation
from models.language.router import Router, RouterTrace


class DecoderLayer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = layer_norm(config)
        self.attention_residual = Residual(config)
        self.self_attn = MIXERS[config.mixer_kind(layer)](config)
        self.has_mlp = config.has_mlp(layer)
        if not self.has_mlp:
            return
        self.post_attention_layernorm = layer_norm(config)
        self.mlp_residual = Residual(config)
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
        h_TD = self.attention_residual.read(x_TD, self.input_layernorm)
        y_TD = self.self_attn(h_TD, packing, cos_sin, cache)
        x_TD = self.attention_residual.add(x_TD, y_TD, self.input_layernorm)
        if not self.has_mlp:
            return x_TD
        h_TD = self.mlp_residual.read(x_TD, self.post_attention_layernorm)
        y_TD = self.mlp(h_TD, trace) if self.is_moe else self.mlp(h_TD)
        return self.mlp_residual.add(x_TD, y_TD, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Construction leaves weights undefined: call `init_weights`, or load a checkpoint.

    Parameter names are those of a Hugging Face checkpoint without its leading "model.".
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config.validate()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = final_norm(config)
        self.head_multiplier = head_multiplier(config)
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
        """Return the hidden states that the output head reads, [T, D].

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
        x_TD = self.norm(x_TD)
        return x_TD if self.head_multiplier == 1.0 else x_TD * self.head_multiplier

    def logits(self, hidden_TD: Tensor) -> Tensor:
        return F.linear(hidden_TD, self.head_weight)

    def empty_cache(self, batch: int, max_len: int) -> Cache:
        """A cache for `batch` sequences of at most `max_len` tokens."""
        layers = [cast(DecoderLayer, layer).self_attn.empty_cache(batch, max_len) for layer in self.layers]
        return Cache(layers, batch, max_len, self.embed_tokens.weight.device)

    def init_weights(self, seed: int) -> "Decoder":
        """Draw the weights that the config's `initializer` names. Returns self."""
        initialise(self, seed)
        return self

    def train_all(self) -> None:
        """Let every weight train again, but for the random features of Performer layers, which never do."""
        self.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, PerformerAttention):
                module.projection.requires_grad_(False)

    def routers(self) -> list[Router]:
        """The routers of the mixture layers, in the order of a trace's records."""
        return [module for module in self.modules() if isinstance(module, Router)]
