"""The experts: SwiGLU feed-forwards of one shape, their weights stacked, and all of them in two grouped products.

T tokens, K experts per token, E experts, D hidden size, I inner size, S rows sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.dispatch import Dispatch, fused_on_cuda


class Experts(nn.Module):
    """Weights: gate and up [E, 2I, D], down [E, D, I]."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        """Σ_k weights[t, k] · expert(experts[t, k])(x[t]), [T, D]. kept_TK: False for choices that are left out."""
        dispatch = Dispatch.of(experts_TK, self.down_proj.shape[0], kept_TK)
        y_SD = self.rows(dispatch.spread(x_TD), dispatch.take(weights_TK), dispatch.ends_E)
        return dispatch.collect(y_SD)

    def rows(self, x_SD: Tensor, weights_S: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its own expert, times its weight, [S, D]."""
        return grouped_swiglu(x_SD, weights_S, ends_E, self.gate_up_proj, self.down_proj)


def grouped_swiglu(x_SD: Tensor, weights_S: Tensor, ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """weights[s] · down(silu(gate(x)) · up(x)) with the weights of the expert that owns row s, [S, D].

    The weight is multiplied in before `down`, which is linear: there the rows are narrow and already in registers.
    """
    gate_up_S2I = GroupedLinear.apply(x_SD, gate_up_proj, ends_E)
    return GroupedLinear.apply(weighted_swiglu(gate_up_S2I, weights_S), down_proj, ends_E)


def looped_swiglu(x_SD: Tensor, weights_S: Tensor, ends_E: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The same, expert by expert: what grouped_swiglu is checked and timed against."""
    outputs = []
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        gate_up = F.linear(x_SD[begin:end], gate_up_proj[expert])
        outputs.append(F.linear(weighted_swiglu(gate_up, weights_S[begin:end]), down_proj[expert]))
        begin = end
    return torch.cat(outputs)


@fused_on_cuda
def weighted_swiglu(gate_up_S2I: Tensor, weights_S: Tensor) -> Tensor:
    """weights · silu(gate) · up in float32, rounded once, [S, I]."""
    gate_SI, up_SI = gate_up_S2I.float().chunk(2, -1)
    return (F.silu(gate_SI) * up_SI * weights_S[:, None]).to(gate_up_S2I.dtype)


class GroupedLinear(torch.autograd.Function):
    """Row s times the transposed weight [N, M] of its group: [S, M] → [S, N].

    Autograd's own backward would give the weight's gradient in transposed layout, and copy it.
    """

    @staticmethod
    def forward(ctx: Any, x_SM: Tensor, weight_ENM: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SM, weight_ENM, ends_E)
        if len(x_SM) == 0:  # grouped_mm refuses it
            return x_SM.new_empty(0, weight_ENM.shape[1])
        return F.grouped_mm(x_SM, weight_ENM.mT, offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SM, weight_ENM, ends_E = ctx.saved_tensors
        if len(x_SM) == 0:
            return torch.zeros_like(x_SM), torch.zeros_like(weight_ENM), None
        grad_SN = grads[0].contiguous()
        grad_x = F.grouped_mm(grad_SN, weight_ENM, offs=ends_E) if ctx.needs_input_grad[0] else None
        grad_weight = F.grouped_mm(grad_SN.mT, x_SM, offs=ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
