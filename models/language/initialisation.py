"""Initial weights, by name. The same seed gives the same weights on every device.

    truncated_normal   σ = initializer_range, cut at ± 3σ; matrices that write to the residual stream get
                       σ / √(2 · layers), so that the stream's variance does not grow with depth (GPT-2)
    xavier             σ² = 2 / (fan_in + fan_out)      Glorot and Bengio 2010, eq. 12
    lecun              σ² = 1 / fan_in                  LeCun et al. 1998, section 4.6
    he                 σ² = 2 / fan_in                  He et al. 2015 (arXiv 1502.01852), eq. 10
    orthogonal         orthogonal rows or columns       Saxe et al. 2014 (arXiv 1312.6120)
    t5                 lecun, but q: σ² = 1 / (fan_in · head_dim), so that q · k has variance 1 without a division by
                       √head_dim (attention_scaling "none"); an untied embedding: σ = 1 (Raffel et al. 2020, arXiv
                       1910.10683, in its code)
    deepnorm           xavier; v, o and the feed-forward times β = (8 layers)^(−1/4) (arXiv 2203.00555, figure 2)
    fixup              he, times L^(−1/(2m−2)) for L = 2 · layers branches of m = 2 matrices; the last matrix of a
                       branch and an untied head are 0, the gates 1 (arXiv 1901.09321, section 3.2; without its biases)

The normal ones are not cut. The embedding of a tied head is drawn as a head is. What follows the width beside that, in
parametrisations "mup" and "ntk", is in parametrisation.py.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.gated_attention_unit import GatedAttentionUnit
from models.language.kernel_attention import PerformerAttention
from models.language.linear_attention import Decay
from models.language.norm import Residual, deepnorm_beta
from models.language.parametrisation import is_hidden
from models.language.router import Router

if TYPE_CHECKING:
    from models.language.decoder import Decoder

QUERIES = ("q_proj",)
WRITERS = ("o_proj", "down_proj")  # the last matrices of the residual branches
DEEPNORM_SCALED = ("v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@torch.no_grad()
def initialise(model: "Decoder", seed: int) -> None:
    """Draw every parameter of the model."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        value = torch.empty(parameter.shape)
        stacked = config.initializer != "truncated_normal"  # which draws each number by itself
        for matrix in _matrices(name, value) if stacked else (value,):
            _draw(matrix, name, config, generator)
        parameter.copy_(value * _width_factor(name, config))
    for module in model.modules():
        if isinstance(module, Residual) and module.placement == "none":
            module.gate.fill_(1.0 if config.initializer == "fixup" else 0.0)
        if isinstance(module, (Decay, PerformerAttention, GatedAttentionUnit)):
            module.initialise(generator)
        if isinstance(module, Router) and module.has_bias:
            module.e_score_correction_bias.zero_()


def _matrices(name: str, value: Tensor) -> Iterator[Tensor]:
    """The [out, in] matrices that a parameter consists of: experts are stacked, and a gate lies above its up."""
    if value.ndim == 2:
        yield value
    else:
        for expert in value:
            yield from expert.chunk(2) if name.endswith("gate_up_proj") else (expert,)


def _draw(matrix: Tensor, name: str, config: LanguageConfig, generator: torch.Generator) -> None:
    fan_in = matrix.shape[-1]
    scheme, layers = config.initializer, config.num_hidden_layers
    writes, hidden = _is(name, WRITERS), is_hidden(name)
    match scheme:
        case "truncated_normal":
            std = config.initializer_range / (math.sqrt(2 * layers) if writes else 1.0)
            nn.init.trunc_normal_(matrix, std=std, a=-3 * std, b=3 * std, generator=generator)
        case "orthogonal":
            nn.init.orthogonal_(matrix, generator=generator)
        case "xavier":
            nn.init.xavier_normal_(matrix, generator=generator)
        case "deepnorm":
            gain = deepnorm_beta(layers) if hidden and _is(name, DEEPNORM_SCALED) else 1.0
            nn.init.xavier_normal_(matrix, gain, generator=generator)
        case "he":
            nn.init.kaiming_normal_(matrix, generator=generator)
        case "fixup" if writes or name == "lm_head.weight":
            matrix.zero_()
        case "fixup":
            nn.init.kaiming_normal_(matrix, generator=generator)
            if hidden:
                matrix.mul_((2 * layers) ** -0.5)
        case "t5" if _is(name, QUERIES):
            matrix.normal_(std=(fan_in * config.head_dim) ** -0.5, generator=generator)
        case "t5" if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            matrix.normal_(generator=generator)
        case _:  # lecun, and the rest of t5
            matrix.normal_(std=fan_in**-0.5, generator=generator)


def _width_factor(name: str, config: LanguageConfig) -> float:
    """What turns the drawn σ into that of "mup" or "ntk"; both agree at initialisation."""
    if config.parametrization == "standard":
        return 1.0
    m = config.hidden_size / config.base_hidden_size
    by_fan = config.initializer != "truncated_normal"
    if is_hidden(name):
        return 1.0 if by_fan else m**-0.5
    unit = config.initializer == "t5" and name == "embed_tokens.weight" and not config.tie_word_embeddings
    return m**0.5 if by_fan and not unit else 1.0  # embedding and head keep the σ of the base width


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    return any(part in kinds for part in name.split("."))
