"""Low-rank adapters on the UNet (Hu et al. 2021, arXiv 2106.09685), in diffusers' file format.

pytorch_lora_weights.safetensors holds `unet.<layer>.lora_A.weight` (r × in) and `.lora_B.weight` (out × r), and in its
header, under `lora_adapter_metadata`, rank and α. A file without that header means α = r. Older names are read too:
those of diffusers' own layers (`<layer>.lora.down.weight`, `.lora.up.weight`), and those of the attention processors
that it had before them (`<attention>.processor.to_q_lora.down.weight`; `to_out_lora` is the Linear `to_out.0`).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.diffusion.unet import UNet
from models.errors import UserError
from models.language.checkpoint import write_tensors
from models.language.lora_layers import LoraConfig, LoraLinear, LowRank

WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_NAME = "default"
_PREFIX = "unet."
_METADATA = "lora_adapter_metadata"
_OF_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")
_OLD_SUFFIXES = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}


def attach_lora(unet: UNet, config: LoraConfig, seed: int) -> None:
    """Put an adapter beside every Linear whose name ends in one of `config.targets`; freeze everything else.

    A is drawn as a Linear's weight is and B is 0: the UNet starts unchanged. Raises UserError for an unknown target.
    """
    config.validate()
    if config.use_rslora or config.use_dora or config.init != "uniform":
        raise UserError("lora: the UNet takes plain LoRA alone; leave use_rslora, use_dora and init as they are")
    linears = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    for target in config.targets:
        if not any(_is_target(name, target) for name in linears):
            raise UserError(f"lora: no layer's name ends in {target!r}; for example {', '.join(ATTENTION)} do")
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if any(_is_target(name, target) for target in config.targets):
            _adapt(unet, name, linear, config, generator)


def adapters(unet: UNet) -> dict[str, LowRank]:
    """The adapters by the names of their Linears."""
    return {name: layer.parts(_NAME)["weight"] for name, layer in _layers(unet).items()}


def _layers(unet: UNet) -> dict[str, LoraLinear]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLinear)}


def save_lora(unet: UNet, folder: Path) -> None:
    """Write the adapters as diffusers' `save_lora_weights` does. Raises UserError if the folder cannot be written."""
    layers = adapters(unet)
    if not layers:
        raise ValueError("the UNet has no adapters")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    first = next(iter(layers.values()))
    r = len(first.lora_A)
    settings = {"r": r, "lora_alpha": first.scaling * r, "target_modules": sorted(layers)}
    metadata = {_METADATA: json.dumps({_PREFIX + key: value for key, value in settings.items()}, sort_keys=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the adapter ({error}); free some space or choose another folder"
        ) from None


def load_lora(unet: UNet, folder: Path) -> None:
    """Attach the adapters of a file that diffusers or `save_lora` wrote; freeze everything else.

    Raises UserError for a missing or broken file, for adapters of other kinds or of the text encoder, and for tensors
    that do not fit the UNet.
    """
    file = folder / WEIGHTS
    tensors, settings = _read(file)
    linears = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    pairs: dict[str, dict[str, Tensor]] = {}
    for stored_name, tensor in tensors.items():
        name = _today(stored_name)
        layer, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not name.startswith(_PREFIX) or part not in ("A.weight", "B.weight"):
            raise UserError(f"{file}: {stored_name} is not supported; only plain LoRA on the UNet's Linears is")
        if layer not in linears:
            raise UserError(f"{file}: this UNet has no Linear {layer}; was the adapter trained on another model?")
        pairs.setdefault(layer, {})[part[0]] = tensor
    unet.requires_grad_(False)
    for layer, pair in pairs.items():
        linear = linears[layer]
        for part in "AB":
            if part not in pair:
                raise UserError(f"{file}: {layer} has no lora_{part}; copy the adapter again")
        r = len(pair["A"])
        if pair["A"].shape != (r, linear.in_features) or pair["B"].shape != (linear.out_features, r):
            raise UserError(
                f"{file}: the adapter of {layer} has shapes {list(pair['A'].shape)} and {list(pair['B'].shape)}, but "
                f"the layer is {list(linear.weight.shape)}; was the adapter trained on another model?"
            )
        config = LoraConfig(r=r, alpha=settings.get("lora_alpha", r), targets=(layer,))
        adapted = _adapt(unet, layer, linear, config, torch.Generator())
        with torch.no_grad():
            adapted.lora_A.copy_(pair["A"])
            adapted.lora_B.copy_(pair["B"])


@torch.no_grad()
def merge_lora(unet: UNet) -> None:
    """Add each adapter to its weight, and leave plain Linears behind."""
    for name, layer in _layers(unet).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.merged_weight("weight"), requires_grad=False)
        plain.bias = layer.bias
        _replace(unet, name, plain)


def _adapt(unet: UNet, name: str, linear: nn.Linear, config: LoraConfig, generator: torch.Generator) -> LowRank:
    if isinstance(linear, LoraLinear):
        raise ValueError("the UNet already has adapters")
    layer = LoraLinear(linear)
    layer.add(_NAME, "weight", config, generator)
    layer.active = _NAME
    _replace(unet, name, layer)
    return layer.parts(_NAME)["weight"]


def _replace(unet: UNet, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _today(name: str) -> str:
    name = _OF_PROCESSOR.sub(r".\1.lora.", name).replace(".to_out.lora.", ".to_out.0.lora.")
    for old, new in _OLD_SUFFIXES.items():
        name = name.replace(old, new)
    return name


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file}: missing; only adapters in safetensors are read")
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a dict)
            header = json.loads((stored.metadata() or {}).get(_METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the adapter again") from None
    settings = {key.removeprefix(_PREFIX): value for key, value in header.items() if key.startswith(_PREFIX)}
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"):
        if settings.get(key):
            raise UserError(f"{file}: {key} is set, which is not supported; train the adapter without it")
    if not tensors:
        raise UserError(f"{file}: holds no tensors; copy the adapter again")
    return tensors, settings
