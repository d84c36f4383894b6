"""The temperature of softmax attention, put into the queries: kernels divide q · k by √head_dim by themselves.

    sqrt       q · k / √d    variance 1 for independent q and k of variance 1 (Vaswani et al. 2017, section 3.2.1)
    inverse    q · k / d     after training q and k are aligned, and their product grows with d (muP, definition 4.1)
    none       q · k         T5 (Raffel et al. 2020): the initial queries are smaller by √d instead

With n₀ = `log_n_from` logits are multiplied by max(1, log n / log n₀) where a token reads n tokens: the entropy of
attention then grows less with the length (Chiang and Cholak 2022, arXiv 2202.12172, section 5.3; Qwen 1).
"""

import math

from torch import Tensor, nn

from models.language.config import LanguageConfig


class QueryScale(nn.Module):
    """For one layer of softmax attention; log n counts where a token reads all earlier ones."""

    def __init__(self, config: LanguageConfig, reads_all: bool) -> None:
        super().__init__()
        wanted = {"sqrt": config.head_dim**-0.5, "inverse": 1 / config.head_dim, "none": 1.0}[config.attention_scaling]
        self.factor = wanted * math.sqrt(config.head_dim)
        self.log_n_from = config.log_n_from if reads_all else 0

    def forward(self, q_THC: Tensor, positions_T: Tensor) -> Tensor:
        if self.factor != 1.0:
            q_THC = q_THC * self.factor
        if self.log_n_from:
            log_n_T = (positions_T.float() + 1).log() / math.log(self.log_n_from)
            q_THC = q_THC * log_n_T.clamp(min=1.0).to(q_THC.dtype)[:, None, None]
        return q_THC
