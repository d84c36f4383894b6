"""Mixture of experts: each token goes through the few experts that a learned router picks for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.mlp import DenseMLP


@dataclass(frozen=True)
class RouterRecord:
    """What one mixture layer's router did with a pack."""

    logits_TE: Tensor  # float32, with gradient
    experts_TK: Tensor  # int64: the chosen experts, best first


class Router(nn.Module):
    """Softmax over experts in float32, then the top k."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob

    def forward(self, x_TD: Tensor) -> tuple[RouterRecord, Tensor]:
        """The record, and the weight of each chosen expert, float32 [T, top_k]."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return RouterRecord(logits_TE, experts_TK), weights_TK


class Experts(nn.Module):
    """SwiGLU experts, their weights stacked: gate and up [E, 2I, D], down [E, D, I]."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Dropless: tokens are sorted by expert, and one grouped product serves all experts."""
        tokens, top_k = experts_TK.shape
        order = experts_TK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=self.down_proj.shape[0])
        ends = counts.cumsum(0).to(torch.int32)
        x_SD = x_TD[order // top_k]  # S = T * top_k rows, those of expert 0 first
        gate, up = F.grouped_mm(x_SD, self.gate_up_proj.mT, offs=ends).chunk(2, -1)
        y_SD = F.grouped_mm(F.silu(gate) * up, self.down_proj.mT, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        y_TKD = y_SD[back].view(tokens, top_k, -1)
        return (y_TKD * weights_TK.to(y_TKD.dtype)[..., None]).sum(1)


class MixtureOfExperts(nn.Module):
    """Routed experts, plus one that every token passes if `shared_expert_intermediate_size` > 0 (as in Qwen2-MoE)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert: DenseMLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = DenseMLP(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, trace: list[RouterRecord] | None) -> Tensor:
        record, weights_TK = self.gate(x_TD)
        if trace is not None:
            trace.append(record)
        y_TD = self.experts(x_TD, record.experts_TK, weights_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert_gate(x_TD).sigmoid() * self.shared_expert(x_TD)
        return y_TD


def load_balancing_loss(records: Sequence[RouterRecord]) -> Tensor:
    """E · Σ_e f_e P_e, averaged over layers: 1 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4–6, no α).

    f_e is the share of the top-k choices that fell on expert e, P_e the mean probability the router gave it.
    """
    losses = []
    for record in records:
        experts = record.logits_TE.shape[-1]
        share_E = torch.bincount(record.experts_TK.flatten(), minlength=experts) / record.experts_TK.numel()
        losses.append(experts * (share_E * record.logits_TE.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def router_z_loss(records: Sequence[RouterRecord]) -> Tensor:
    """Mean squared log-partition of the router logits, averaged over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return torch.stack([record.logits_TE.logsumexp(-1).square().mean() for record in records]).mean()


def expert_load(records: Sequence[RouterRecord]) -> dict[str, float]:
    """Averages over layers. `max_violation`: the busiest expert's load over the mean load, minus 1 (Wang et al. 2024,
    arXiv 2408.15664, eq. 4); `load_entropy`: entropy of the loads divided by log E, 1 when balanced."""
    violations, entropies = [], []
    for record in records:
        experts = record.logits_TE.shape[-1]
        share_E = torch.bincount(record.experts_TK.flatten(), minlength=experts).double() / record.experts_TK.numel()
        violations.append(share_E.max() * experts - 1)
        entropies.append(torch.special.entr(share_E).sum() / torch.tensor(float(experts)).log().clamp(min=1e-9))
    return {
        "max_violation": torch.stack(violations).mean().item(),
        "load_entropy": torch.stack(entropies).mean().item(),
    }
