"""The low-rank layers: what stands beside a weight W [N, M] (or a stack of them) and how it acts.

    LoRA     y = W x + s B A x                    s = α / r     (Hu et al. 2021, arXiv 2106.09685, eq. 3)
    rsLoRA   the same with s = α / √r                           (Kalajdzievski 2023, arXiv 2312.03732, eq. 4)
    DoRA     y = m / ‖W + s B A‖ · (W + s B A) x                (Liu et al. 2024, arXiv 2402.09353, eq. 5)
    PiSSA    y = (W − s B₀ A₀) x + s B A x                      (Meng et al. 2024, arXiv 2404.02948, eq. 2–5)

The norm in DoRA is that of each row, and counts as a constant in the backward pass (section 4.3 of the paper). In PiSSA
s B₀ A₀ is the best approximation of W by rank r, and training starts from it. W itself stays as it was: the residual is
never written over it, so that other adapters may stand on the same W.

Shapes: A [r, M], B [N, r], m [N]; x [T, M]. A stack of experts has them with a leading E.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError


@dataclass(frozen=True)
class LoraConfig:
    r: int = 16
    alpha: float = 32.0
    # Linears by the last parts of their names, "all-linear", "experts.gate_up_proj", "experts.down_proj"
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["uniform", "pissa"] = "uniform"  # of A and B: (random, 0), or the first singular vectors of W

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def validate(self) -> "LoraConfig":
        """Return self. Raises UserError naming the field and the mend."""
        if self.r < 1:
            raise UserError(f"lora: r is {self.r}; it must be at least 1")
        if self.alpha <= 0:
            raise UserError(f"lora: alpha is {self.alpha}; it must be positive (often r or 2 r)")
        if self.init not in ("uniform", "pissa"):
            raise UserError(f"lora: init is {self.init!r}; use 'uniform' or 'pissa'")
        if self.use_dora and self.init == "pissa":
            raise UserError("lora: use_dora and init 'pissa' do not go together; choose one of them")
        return self


class LowRank(nn.Module):
    """One adapter's trained tensors beside one weight."""

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        self.config, self.scaling = config, config.scaling
        self.lora_A = nn.Parameter(weight.new_empty(*experts, config.r, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(*experts, rows, config.r))
        # Float32 beside a bfloat16 weight too, as rounding m changes whole rows: the policy would not start unchanged.
        self.lora_magnitude = nn.Parameter(weight.new_empty(rows, dtype=torch.float32)) if config.use_dora else None
        if config.init == "pissa":  # frozen, and parameters so that a checkpoint has them
            self.start_A = nn.Parameter(torch.empty_like(self.lora_A), requires_grad=False)
            self.start_B = nn.Parameter(torch.empty_like(self.lora_B), requires_grad=False)

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """Such that nothing changes yet: B = 0, or B A = B₀ A₀; and m = ‖W‖."""
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(row_norms(weight))
        if self.config.init == "uniform":  # A as a Linear's own weight is drawn
            bound = 1 / math.sqrt(weight.shape[-1])
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
            return
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (singular[..., : self.config.r] / self.scaling).sqrt()
        self.start_A.copy_(root[..., :, None] * right[..., : self.config.r, :])
        self.start_B.copy_(left[..., : self.config.r] * root[..., None, :])
        self.lora_A.copy_(self.start_A)
        self.lora_B.copy_(self.start_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the plain LoRA that does the same; PiSSA's have rank 2 r: B A − B₀ A₀ = [B, −B₀] [A; A₀]."""
        if self.config.init != "pissa":
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A], -2), torch.cat([self.lora_B, -self.start_B], -1)

    def delta(self) -> Tensor:
        """s B A (− s B₀ A₀), in float32, of the weight's shape."""
        a, b = self.factors()
        return (b.float() @ a.float()) * self.scaling

    def linear(self, x: Tensor, weight_NM: Tensor) -> Tensor:
        """The adapted product with x, [..., M] → [..., N]."""
        return self._linear(x.flatten(0, -2), weight_NM).unflatten(0, x.shape[:-1])

    def _linear(self, x_TM: Tensor, weight_NM: Tensor) -> Tensor:
        a_RM, b_NR = self.factors()
        h_TR = F.linear(x_TM, a_RM) * self.scaling
        y_TN = F.linear(x_TM, weight_NM).addmm_(h_TR, b_NR.mT.to(h_TR.dtype))  # autocast leaves out what is in place
        if self.lora_magnitude is None:
            return y_TN
        norm_N = adapted_row_norms(weight_NM, a_RM, b_NR, self.scaling)
        return _ScaleColumns.apply(y_TN, self.lora_magnitude / norm_N)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight that does the same alone, and by what its rows were scaled; both float32."""
        merged = weight.float() + self.delta()
        if self.lora_magnitude is None:
            return merged, None
        scale = self.lora_magnitude.float() / row_norms(merged)
        return merged * scale[:, None], scale


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean length of each row, float32; a row of zeros counts as the smallest normal number."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def adapted_row_norms(weight_NM: Tensor, a_RM: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, float32 [N], without a second matrix of W's size:

    ‖w + s A b‖² = ‖w‖² + 2 s (A w)·b + s² b·(A Aᵀ) b

    The parts can cancel, so they are added in float64.
    """
    cross_NR = F.linear(weight_NM, a_RM).double()
    a_RM, b_NR = a_RM.double(), b_NR.double()
    low_rank_NR = 2 * scaling * cross_NR + scaling**2 * (b_NR @ (a_RM @ a_RM.mT))
    squared_N = row_norms(weight_NM).double().square() + (low_rank_NR * b_NR).sum(-1)
    return squared_N.clamp(min=torch.finfo(torch.float32).tiny).sqrt().float()


class _ScaleColumns(torch.autograd.Function):
    """y · c for c [N] without zeros, float32, rounded once to the dtype of y: above 1 a bfloat16 c has steps of 0.8%.
    It keeps the product for the backward pass, not y: most often whatever reads the product keeps it too, so it takes
    no memory of its own."""

    @staticmethod
    def forward(ctx: Any, y_TN: Tensor, c_N: Tensor) -> Tensor:
        out_TN = torch.mul(y_TN, c_N, out=torch.empty_like(y_TN))
        ctx.save_for_backward(out_TN, c_N)
        return out_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        out_TN, c_N = ctx.saved_tensors
        grad_c = (grads[0] * out_TN).sum(0, dtype=torch.float32) / c_N if ctx.needs_input_grad[1] else None
        return torch.mul(grads[0], c_N, out=torch.empty_like(grads[0])), grad_c


class Adapted(nn.Module):
    """A layer with adapters beside some of its weights, its parts. One adapter at a time acts, or none.

    adapters[name][part] is a LowRank; the layer keeps its own parameters under their own names.
    """

    adapters: nn.ModuleDict
    active: str | None
    merged: bool  # the active adapter is written into the weights
    _scales: dict[str, Tensor]  # of merged DoRA rows

    def prepare(self) -> None:
        self.adapters = nn.ModuleDict()
        self.active, self.merged, self._scales = None, False, {}

    def add(self, name: str, part: str, config: LoraConfig, generator: torch.Generator) -> None:
        weight = self.get_parameter(part)
        adapter = LowRank(weight, config)
        adapter.initialise(weight, generator)
        if name not in self.adapters:
            self.adapters[name] = nn.ModuleDict()
        self.adapters[name][part] = adapter  # type: ignore[operator]

    def parts(self, name: str | None) -> dict[str, LowRank]:
        """The weights that an adapter stands beside, by name."""
        if name is None or name not in self.adapters:
            return {}
        return dict(self.adapters[name].items())  # type: ignore[operator]

    def acting(self, part: str) -> LowRank | None:
        """What the forward pass must add to a weight."""
        return None if self.merged else self.parts(self.active).get(part)

    def merged_weight(self, part: str) -> Tensor:
        """The weight with the active adapter in it; the layer is left as it is."""
        weight, adapter = self.get_parameter(part).detach(), self.acting(part)
        return weight if adapter is None else adapter.merged(weight)[0].to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if self.merged:
            return
        for part, adapter in self.parts(self.active).items():
            weight = self.get_parameter(part)
            merged, scale = adapter.merged(weight)
            weight.copy_(merged)
            if scale is not None:
                self._scales[part] = scale
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            return
        for part, adapter in self.parts(self.active).items():
            weight = self.get_parameter(part)
            base = weight.float()
            if part in self._scales:
                base = base / self._scales.pop(part)[:, None]
            weight.copy_(base - adapter.delta())
        self.merged = False

    def fold(self) -> None:
        """Merge for good, and forget every adapter: without them the layer is a plain one."""
        self.merge()
        self.prepare()


class LoraLinear(Adapted, nn.Linear):
    """A Linear with adapters. Its part is "weight"."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.acting("weight")
        if adapter is None:
            return F.linear(x, self.weight, self.bias)
        y = adapter.linear(x, self.weight)
        return y if self.bias is None else y + self.bias
