"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685, eq. 3): y = W x + (α / r) B A x, with only A and B trained.

Adapters are read and written in PEFT's format, so that peft and vLLM can use them.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import UserError
from models.language.decoder import Decoder

_PEFT_PREFIX = "base_model.model.model."  # peft's wrapper, the causal LM, its decoder


@dataclass(frozen=True)
class LoraConfig:
    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # last part of a Linear's name


class LoraLinear(nn.Linear):
    """A Linear with an adapter beside it. It keeps the Linear's own parameters under their own names."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.scaling = alpha / r
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged:
            return y
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    def delta(self) -> Tensor:
        """(α / r) B A, in float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight of a plain Linear that does the same."""
        if self.merged:
            return self.weight.detach()
        return (self.weight.float() + self.delta()).to(self.weight.dtype)


def attach(model: Decoder, config: LoraConfig, seed: int) -> None:
    """Put an adapter beside every targeted Linear, and freeze everything else.

    A is drawn uniformly as a Linear's weight is, and B is 0: the model starts unchanged. Raises UserError for an
    unknown target.
    """
    if config.r < 1:
        raise UserError(f"lora: r is {config.r}; it must be at least 1")
    if adapters(model):
        raise ValueError("the model already has adapters")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    available = {name.rpartition(".")[2] for name in linears} - {"lm_head"}
    for target in config.targets:
        if target not in available:
            raise UserError(f"lora: no layer is named {target!r}; targets can be {', '.join(sorted(available))}")
    if not config.targets:
        raise UserError(f"lora: targets is empty; name some of {', '.join(sorted(available))}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        if child not in config.targets:
            continue
        adapted = LoraLinear(linear, config.r, config.alpha)
        bound = 1 / math.sqrt(linear.in_features)
        with torch.no_grad():
            adapted.lora_A.copy_(torch.empty(adapted.lora_A.shape).uniform_(-bound, bound, generator=generator))
        setattr(model.get_submodule(parent), child, adapted)


def adapters(model: Decoder) -> dict[str, LoraLinear]:
    """The adapted Linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge(model: Decoder) -> None:
    """Add each adapter to its weight, so that the forward pass costs no more than without it."""
    for layer in adapters(model).values():
        layer.weight.copy_(layer.merged_weight())
        layer.merged = True


@torch.no_grad()
def unmerge(model: Decoder) -> None:
    """Undo `merge`, up to rounding."""
    for layer in adapters(model).values():
        if layer.merged:
            layer.weight.copy_(layer.weight.float() - layer.delta())
            layer.merged = False


def save_adapter(model: Decoder, folder: Path, config: LoraConfig, base_model: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in adapters(model).items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(config.targets),
    }
    try:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the adapter ({error}); free some space or choose another folder"
        ) from None


def load_adapter(model: Decoder, folder: Path) -> LoraConfig:
    """Attach the adapter that peft or `save_adapter` wrote. Its dropout is ignored.

    Raises UserError for a missing or broken file, for kinds of adapter other than plain LoRA, and for tensors that do
    not fit the model.
    """
    config = _read_adapter_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: missing; only safetensors adapters are read, save it with safe_serialization=True")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the adapter again") from None
    attach(model, config, seed=0)
    wanted = {}
    for name, layer in adapters(model).items():
        wanted[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        wanted[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in sorted(wanted.keys() ^ tensors.keys()):
        state = "is missing" if name in wanted else "does not belong to this model"
        raise UserError(f"{file}: the tensor {name} {state}; was the adapter trained on another model?")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                raise UserError(
                    f"{file}: {name} has shape {list(tensors[name].shape)}, this model needs {list(parameter.shape)}; "
                    "was the adapter trained on another model?"
                )
            parameter.copy_(tensors[name])
    return config


def _read_adapter_config(file: Path) -> LoraConfig:
    try:
        given: dict[str, Any] = json.loads(file.read_text())
    except OSError:
        raise UserError(f"{file}: missing; a LoRA folder holds adapter_config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the adapter again") from None
    if given.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {given.get('peft_type')!r}; only 'LORA' is supported")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"):
        if given.get(key):
            raise UserError(f"{file}: {key} is set, which is not supported; train the adapter without it")
    if given.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {given['bias']!r}; only 'none' is supported")
    targets = given.get("target_modules")
    if not isinstance(targets, list) or "r" not in given or "lora_alpha" not in given:
        raise UserError(f"{file}: needs r, lora_alpha and a list target_modules")
    return LoraConfig(r=given["r"], alpha=given["lora_alpha"], targets=tuple(sorted(targets)))
