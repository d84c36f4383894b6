"""Normalisation of hidden states, and where a layer has it.

pre        x + F(N(x))             Xiong et al. 2020 (arXiv 2002.04745), figure 1b; GPT-2, Llama, Qwen
post       N(x + F(x))             Vaswani et al. 2017 (arXiv 1706.03762), section 3.1
sandwich   x + N'(F(N(x)))         Ding et al. 2021 (arXiv 2105.13290), section 2.4
deepnorm   N(α x + F(x))           Wang et al. 2022 (arXiv 2203.00555), figure 2; α = (2 layers)^(1/4)
none       x + g F(x)              a learned scalar g: 0 at first in ReZero (Bachlechner et al. 2020, arXiv
                                   2003.04887, eq. 1) and SkipInit (De and Smith 2020, arXiv 2002.10444), 1 in
                                   Fixup (Zhang et al. 2019, arXiv 1901.09321)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}


def layer_norm(config: LanguageConfig) -> nn.Module:
    """The norm of a residual branch; it does nothing where the placement is "none"."""
    if config.norm_placement == "none":
        return nn.Identity()
    return NORMS[config.norm_type](config.hidden_size, config.rms_norm_eps)


def final_norm(config: LanguageConfig) -> nn.Module:
    """The norm before the output head. After a post-norm layer there is nothing left to normalise."""
    return layer_norm(config) if config.norm_placement in ("pre", "sandwich") else nn.Identity()


class Residual(nn.Module):
    """How one branch F reads the residual stream and is added to it; the branch's norm N is the caller's."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.keep = deepnorm_alpha(config.num_hidden_layers) if self.placement == "deepnorm" else 1.0
        if self.placement == "sandwich":
            self.outer_norm = layer_norm(config)
        if self.placement == "none":
            self.gate = nn.Parameter(torch.zeros(1))

    def read(self, x_TD: Tensor, norm: nn.Module) -> Tensor:
        """What the branch gets."""
        return norm(x_TD) if self.placement in ("pre", "sandwich") else x_TD

    def add(self, x_TD: Tensor, y_TD: Tensor, norm: nn.Module) -> Tensor:
        """The stream after the branch gave y."""
        match self.placement:
            case "pre":
                return x_TD + y_TD
            case "sandwich":
                return x_TD + self.outer_norm(y_TD)
            case "none":
                return x_TD + self.gate * y_TD
            case _:
                return norm(self.keep * x_TD + y_TD)


def deepnorm_alpha(layers: int) -> float:
    """How much of the stream a DeepNorm layer of a decoder keeps (figure 2 of the paper)."""
    return (2 * layers) ** 0.25


def deepnorm_beta(layers: int) -> float:
    """The gain of a decoder's value, output and feed-forward matrices (figure 2 of the paper)."""
    return (8 * layers) ** -0.25
