"""Adapters on a stack of experts: every expert has an A and a B of its own, and grouped products serve all of them.

S rows sorted by expert, E experts, D hidden size, I inner size, R rank.
"""

from torch import Tensor, nn

from models.errors import UserError
from models.language.experts import Experts, GroupedLinear, weighted_swiglu
from models.language.lora_layers import Adapted, LoraConfig, LowRank

ALIGNMENT = 16  # bytes: what a grouped product asks of its rows


class LoraExperts(Adapted, Experts):
    """Experts with adapters. The parts are "gate_up_proj" (gate and up share A) and "down_proj"."""

    def __init__(self, base: Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.prepare()

    def rows(self, x_SD: Tensor, weights_S: Tensor, ends_E: Tensor) -> Tensor:
        gate_up_S2I = _product(x_SD, self.gate_up_proj, self.acting("gate_up_proj"), ends_E)
        inner_SI = weighted_swiglu(gate_up_S2I, weights_S)
        return _product(inner_SI, self.down_proj, self.acting("down_proj"), ends_E)


def _product(x_SM: Tensor, weight_ENM: Tensor, adapter: LowRank | None, ends_E: Tensor) -> Tensor:
    y_SN = GroupedLinear.apply(x_SM, weight_ENM, ends_E)
    if adapter is None:
        return y_SN
    a_ERM, b_ENR = adapter.factors()
    h_SR = GroupedLinear.apply(x_SM, a_ERM, ends_E) * adapter.scaling
    return y_SN + GroupedLinear.apply(h_SR, b_ENR, ends_E)


def require_expert_settings(config: LoraConfig, itemsize: int) -> None:
    """Raises UserError for settings that experts cannot have. itemsize: bytes of one weight."""
    if config.use_dora:
        raise UserError(
            "lora: use_dora does not reach the stacked experts (nor does peft's); take experts.* out of the targets"
        )
    if config.r * itemsize % ALIGNMENT:
        raise UserError(
            f"lora: r is {config.r}; on experts it must be a multiple of {ALIGNMENT // itemsize}, as the grouped "
            "product wants aligned rows"
        )
