"""Mixture of experts: each token goes through the few experts that a learned router picks for it."""

import dataclasses

from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.dispatch import within_capacity
from models.language.experts import Experts
from models.language.mlp import DenseMLP
from models.language.router import Router, RouterTrace


class MixtureOfExperts(nn.Module):
    """Routed experts, beside a shared one that every token passes if `shared_expert_intermediate_size` > 0.

    The shared expert has a gate of its own as in Qwen2-MoE, or counts fully as in DeepSeek-V3 (`shared_expert_gate`).

    With `expert_capacity_factor` a training pass drops what an expert has no room for. In evaluation mode nothing is
    dropped: there a token's output must not depend on its neighbours in the batch.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.capacity_factor = config.expert_capacity_factor
        self.shared_expert: DenseMLP | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, trace: RouterTrace | None) -> Tensor:
        record, weights_TK = self.gate(x_TD, trace.replayed() if trace is not None else None)
        if self.training and self.capacity_factor is not None:
            experts = record.logits_TE.shape[-1]
            kept_TK = within_capacity(record.experts_TK, weights_TK, experts, self.capacity_factor)
            record = dataclasses.replace(record, kept_TK=kept_TK)
        if trace is not None:
            trace.records.append(record)
        y_TD = self.experts(x_TD, record.experts_TK, weights_TK, record.kept_TK)
        if self.shared_expert is None:
            return y_TD
        shared_TD = self.shared_expert(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = self.shared_expert_gate(x_TD).sigmoid() * shared_TD
        return y_TD + shared_TD
