"""The router of a mixture of experts: which experts a token goes to, and how much each of them counts.

T tokens, E experts, G groups of experts, K chosen experts per token, L mixture layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig

SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class RouterRecord:
    """What one mixture layer's router did with a pack."""

    logits_TE: Tensor  # float32, with gradient
    experts_TK: Tensor  # int64: the chosen experts, best first
    scoring: str = "softmax"
    kept_TK: Tensor | None = None  # bool: which choices found room in their expert; None: all of them

    @property
    def probabilities_TE(self) -> Tensor:
        """The scores of all experts, made to sum to 1."""
        scores_TE = SCORES[self.scoring](self.logits_TE)
        return scores_TE / scores_TE.sum(-1, keepdim=True)


@dataclass
class RouterTrace:
    """Goes through one forward pass from mixture layer to mixture layer and collects what their routers did.

    With `replay_TLK` it also tells them what to do: layer l sends token t to the experts replay_TLK[t, l], weighted by
    the router's own scores of them (rollout routing replay, arXiv 2510.11370, section 4).
    """

    replay_TLK: Tensor | None = None  # int64
    records: list[RouterRecord] = field(default_factory=list)

    def replayed(self) -> Tensor | None:
        """The experts that the next layer has to use, [T, K]."""
        return None if self.replay_TLK is None else self.replay_TLK[:, len(self.records)]


class Router(nn.Module):
    """Scores in float32, then the best K experts.

    scoring_func "softmax" is that of Mixtral and Qwen3-MoE, "sigmoid" that of DeepSeek-V3 (arXiv 2412.19437, eq.
    13–16). With `router_selection_bias` a bias that is moved by the load (see balancing.py) is added to the scores for
    the choice alone, never to the weights. With `n_group` > 1 a token's experts come from its best `topk_group` groups:
    a group counts as much as its best expert (DeepSeek-V2), or, with a selection bias, as its two best (DeepSeek-V3).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.has_bias = config.router_selection_bias
        if self.has_bias:  # a buffer under DeepSeek-V3's name: saved, but no gradient ever reaches it
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.scoring = config.scoring_func
        self.top_k = config.num_experts_per_tok
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.renormalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None = None) -> tuple[RouterRecord, Tensor]:
        """The record, and the weight of each chosen expert, float32 [T, K]. replay_TK: experts to use instead of the
        router's own choice."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = SCORES[self.scoring](logits_TE)
        experts_TK = self.choose(scores_TE.detach()) if replay_TK is None else replay_TK
        weights_TK = scores_TE.gather(-1, experts_TK)
        if self.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all underflow
        return RouterRecord(logits_TE, experts_TK, self.scoring), weights_TK * self.scaling

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The K experts of each token, best first."""
        if self.has_bias:
            scores_TE = scores_TE + self.e_score_correction_bias
        if self.groups > 1:
            grouped_TGE = scores_TE.unflatten(-1, (self.groups, -1))
            value_TG = grouped_TGE.topk(2 if self.has_bias else 1, dim=-1).values.sum(-1)
            best_TG = value_TG.topk(self.top_groups, dim=-1).indices
            closed_TG = torch.ones_like(value_TG, dtype=torch.bool).scatter_(-1, best_TG, False)
            scores_TE = grouped_TGE.masked_fill(closed_TG[..., None], float("-inf")).flatten(-2)
        return scores_TE.topk(self.top_k, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves with the module, but stays float32: a step of the bias is lost in bfloat16."""
        bias = self.e_score_correction_bias if self.has_bias else None
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self
