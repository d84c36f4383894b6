"""Keeping the experts evenly loaded: auxiliary losses, the bias that needs no loss, and what to watch.

T tokens, E experts, K experts per token, B sequences, L mixture layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.router import Router, RouterRecord


def load_balancing_loss(records: Sequence[RouterRecord]) -> Tensor:
    """E · Σ_e f_e P_e, averaged over layers: 1 when balanced (Switch Transformer, arXiv 2101.03961, eq. 4–6, no α).

    f_e is the share of the top-k choices that fell on expert e, P_e the mean probability the router gave it.
    """
    losses = []
    for record in records:
        share_E = _choices(record).float() / record.experts_TK.numel()
        losses.append(record.logits_TE.shape[-1] * (share_E * record.probabilities_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def sequence_balancing_loss(records: Sequence[RouterRecord], sequence_T: Tensor, sequences: int) -> Tensor:
    """The same within each sequence, averaged over sequences and layers (DeepSeek-V3, arXiv 2412.19437, eq. 17–20,
    without α).

    sequence_T: which of the pack's `sequences` sequences each token belongs to.
    """
    losses = []
    for record in records:
        probabilities_TE = record.probabilities_TE
        experts, top_k = probabilities_TE.shape[-1], record.experts_TK.shape[-1]
        chosen_TE = torch.zeros_like(probabilities_TE).scatter_(-1, record.experts_TK, 1.0)
        zeros_BE = probabilities_TE.new_zeros(sequences, experts)
        length_B1 = zeros_BE[:, :1].index_add(0, sequence_T, torch.ones_like(probabilities_TE[:, :1]))
        share_BE = zeros_BE.index_add(0, sequence_T, chosen_TE) * experts / (top_k * length_B1)
        mean_BE = zeros_BE.index_add(0, sequence_T, probabilities_TE) / length_B1
        losses.append((share_BE * mean_BE).sum(-1).mean())
    return torch.stack(losses).mean()


def router_z_loss(records: Sequence[RouterRecord]) -> Tensor:
    """Mean squared log-partition of the router logits, averaged over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return torch.stack([record.logits_TE.logsumexp(-1).square().mean() for record in records]).mean()


@dataclass(frozen=True)
class ExpertLoad:
    """How often each expert was chosen, and how often there was no room. Loads of several packs add up."""

    chosen_LE: Tensor | int = 0
    dropped_L: Tensor | int = 0

    @classmethod
    def of(cls, records: Sequence[RouterRecord]) -> "ExpertLoad":
        """Of one pack; 0 for a dense model."""
        if not records:
            return cls()
        return cls(torch.stack([_choices(r) for r in records]), torch.stack([_dropped(r) for r in records]))

    def __add__(self, other: "ExpertLoad") -> "ExpertLoad":
        return ExpertLoad(self.chosen_LE + other.chosen_LE, self.dropped_L + other.dropped_L)

    def metrics(self) -> dict[str, float]:
        """Averages over layers; empty for a dense model. `max_violation`: the busiest expert's load over the mean load,
        minus 1 (Wang et al. 2024, arXiv 2408.15664, eq. 4); `load_entropy`: entropy of the loads divided by log E, 1
        when balanced; `dropped_share`: share of the choices for which the expert had no room."""
        if isinstance(self.chosen_LE, int):
            return {}
        chosen_LE = self.chosen_LE.double()
        experts = chosen_LE.shape[-1]
        share_LE = chosen_LE / chosen_LE.sum(-1, keepdim=True)
        entropy_L = torch.special.entr(share_LE).sum(-1) / torch.tensor(float(max(experts, 2))).log()
        figures = {
            "max_violation": share_LE.amax(-1).mul(experts).sub(1).mean(),
            "load_entropy": entropy_L.mean(),
            "dropped_share": (self.dropped_L / chosen_LE.sum(-1)).mean(),
        }
        return {name: value.item() for name, value in figures.items()}


@torch.no_grad()
def update_selection_bias(routers: Sequence[Router], load: ExpertLoad, rate: float) -> None:
    """After an optimizer step: experts that were chosen more often than the mean get `rate` less bias, the others
    `rate` more (Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3's γ).

    routers: of the mixture layers, in the order in which the load counts them.
    """
    assert isinstance(load.chosen_LE, Tensor)
    mean_L1 = load.chosen_LE.double().mean(-1, keepdim=True)
    for router, error_E in zip(routers, mean_L1 - load.chosen_LE, strict=True):
        router.e_score_correction_bias += rate * error_E.sign()


def _choices(record: RouterRecord) -> Tensor:
    """How often each expert was chosen, int64 [E]. (bincount would wait for the GPU.)"""
    experts_N = record.experts_TK.flatten()
    return experts_N.new_zeros(record.logits_TE.shape[-1]).index_add_(0, experts_N, torch.ones_like(experts_N))


def _dropped(record: RouterRecord) -> Tensor:
    return record.experts_TK.new_zeros(()) if record.kept_TK is None else (~record.kept_TK).sum()
