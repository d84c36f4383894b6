"""Adapters in PEFT's folder format, which peft and vLLM read: adapter_config.json and adapter_model.safetensors.

    Linear    <layer>.lora_A.weight [r, M], .lora_B.weight [N, r], .lora_magnitude_vector [N]
    experts   <layer>[.base_layer].lora_A.weight [E·r, M], .lora_B.weight [N, r·E]: peft wraps the experts once for
              each adapted parameter, down_proj outermost

An adapter that began with PiSSA is written as the plain LoRA of rank 2 r that does the same on the unchanged base
weights: [B, −B₀] [A; A₀].
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import UserError
from models.language.checkpoint import write_tensors
from models.language.decoder import Decoder
from models.language.experts import Experts
from models.language.lora import ALL_LINEAR, attach, parts
from models.language.lora_layers import LoraConfig, LowRank

PREFIX = "base_model.model.model."  # peft's wrapper, the causal LM, its decoder
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the base weights, or more than A, B and m. All are absent, empty, None or false in a plain adapter.
UNSUPPORTED = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "lora_bias",
    "exclude_modules", "fan_in_fan_out", "trainable_token_indices", "use_qalora", "alora_invocation_tokens",
    "use_bdlora", "velora_config", "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # they leave the base weights alone


def save_adapter(model: Decoder, folder: Path, name: str = "default", base_model: str = "") -> None:
    """Write an adapter. Each file appears whole or not at all. Raises UserError if the folder cannot be written, or if
    peft could not tell the adapter's targets apart."""
    write_adapter(folder, adapter_settings(model, name, base_model), dict(adapter_tensors(model, name)))


def write_adapter(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, tensors)
        (folder / f"{CONFIG}.part").write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(folder / f"{CONFIG}.part", folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the adapter ({error}); free some space or choose another folder"
        ) from None


def adapter_settings(model: Decoder, name: str = "default", base_model: str = "") -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError if peft could not tell the targets apart."""
    adapted = list(parts(model, name))
    config = adapted[0][2].config
    linears = {layer for layer, part, _ in adapted if part == "weight"}
    _require_distinct(model, linears)
    rank, alpha = config.r, config.alpha
    if config.init == "pissa":
        rank, alpha = 2 * config.r, config.alpha * (math.sqrt(2) if config.use_rslora else 2)
    modules = {target for target in config.targets if "experts." not in target}
    if ALL_LINEAR in modules:
        modules = {layer.rpartition(".")[2] for layer in linears}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "target_parameters": sorted(target for target in config.targets if "experts." in target) or None,
    }


def adapter_tensors(model: Decoder, name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """What adapter_model.safetensors holds, on the host."""
    for layer, part, adapter in parts(model, name):
        a, b = (tensor.detach() for tensor in adapter.factors())
        prefix = _peft_name(model, layer, part, name)
        if part != "weight":
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        yield f"{prefix}.lora_A.weight", a.cpu().contiguous()
        yield f"{prefix}.lora_B.weight", b.cpu().contiguous()
        if adapter.lora_magnitude is not None:
            yield f"{prefix}.lora_magnitude_vector", adapter.lora_magnitude.detach().cpu()


def load_adapter(model: Decoder, folder: Path, name: str = "default") -> LoraConfig:
    """Attach the adapter that peft or `save_adapter` wrote, and let it act. Its dropout is ignored.

    Raises UserError for a missing or broken file, for kinds of adapter that we do not have, and for tensors that do
    not fit the model.
    """
    config = _read_config(folder / CONFIG)
    file = folder / TENSORS
    if not file.is_file():
        raise UserError(f"{file}: missing; only safetensors adapters are read, save it with safe_serialization=True")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the adapter again") from None
    attach(model, config, seed=0, name=name)
    load_adapter_tensors(model, tensors, str(file), name)
    return config


@torch.no_grad()
def load_adapter_tensors(model: Decoder, tensors: dict[str, Tensor], source: str, name: str = "default") -> None:
    """Copy tensors under peft's names into an attached adapter. Raises UserError for any that does not fit."""
    slots: dict[str, tuple[Tensor, tuple[int, ...]]] = {}  # where it goes, and the shape that peft has
    experts: dict[str, tuple[LowRank, str]] = {}
    for layer, part, adapter in parts(model, name):
        prefix = _peft_name(model, layer, part, name)
        a, b = adapter.lora_A, adapter.lora_B
        shapes = (tuple(a.shape), tuple(b.shape))
        if part != "weight":
            count, rank, columns = a.shape
            shapes = ((count * rank, columns), (b.shape[1], rank * count))
        slots[f"{prefix}.lora_A.weight"], slots[f"{prefix}.lora_B.weight"] = (a, shapes[0]), (b, shapes[1])
        if adapter.lora_magnitude is not None:
            slots[f"{prefix}.lora_magnitude_vector"] = adapter.lora_magnitude, tuple(adapter.lora_magnitude.shape)
        experts[f"{prefix}.lora_B.weight"] = adapter, part
    for tensor_name in sorted(slots.keys() ^ tensors.keys()):
        state = "is missing" if tensor_name in slots else "does not belong to this model"
        raise UserError(f"{source}: the tensor {tensor_name} {state}; was the adapter trained on another model?")
    for tensor_name, (parameter, shape) in slots.items():
        given = tensors[tensor_name]
        if tuple(given.shape) != shape:
            raise UserError(
                f"{source}: {tensor_name} has shape {list(given.shape)}, this model needs {list(shape)}; was the "
                "adapter trained on another model?"
            )
        if parameter.dim() == 3:
            count, rows, columns = parameter.shape
            by_rank = tensor_name.endswith(".lora_B.weight")
            given = given.view(rows, columns, count).permute(2, 0, 1) if by_rank else given.view(parameter.shape)
        parameter.copy_(given)


def _peft_name(model: Decoder, layer: str, part: str, name: str) -> str:
    both = part == "gate_up_proj" and (layer, "down_proj") in [(at, p) for at, p, _ in parts(model, name)]
    return f"{PREFIX}{layer}{'.base_layer' if both else ''}"


def _require_distinct(model: Decoder, linears: set[str]) -> None:
    """peft takes these names for the experts' wherever a model has experts."""
    if not any(isinstance(module, Experts) for module in model.modules()):
        return
    for layer in sorted(linears):
        if layer.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj"):
            raise UserError(
                f"cannot write the adapter: peft takes {layer} for experts in a mixture-of-experts model; leave dense "
                "MLPs out of the targets, or merge the adapter"
            )


def _read_config(file: Path) -> LoraConfig:
    try:
        return config_from_peft(json.loads(file.read_text()), str(file))
    except OSError:
        raise UserError(f"{file}: missing; a LoRA folder holds {CONFIG}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the adapter again") from None


def config_from_peft(given: Mapping[str, Any], source: str) -> LoraConfig:
    """Read the content of adapter_config.json. Raises UserError for what we cannot run."""
    if given.get("peft_type") != "LORA":
        raise UserError(f"{source}: peft_type is {given.get('peft_type')!r}; only 'LORA' is supported")
    for key in UNSUPPORTED:
        if given.get(key):
            raise UserError(f"{source}: {key} is set, which is not supported; train the adapter without it")
    if given.get("bias", "none") != "none":
        raise UserError(f"{source}: bias is {given['bias']!r}; only 'none' is supported")
    init = given.get("init_lora_weights", True)
    if init not in (*HARMLESS_INITS, "pissa"):
        raise UserError(
            f"{source}: init_lora_weights is {init!r}, which changes the base weights in a way that cannot be "
            "repeated; save the adapter with peft's path_initial_model_for_weight_conversion"
        )
    modules, parameters = given.get("target_modules") or [], given.get("target_parameters") or []
    if not isinstance(modules, list) or not isinstance(parameters, list) or not {"r", "lora_alpha"} <= given.keys():
        raise UserError(f"{source}: needs r, lora_alpha and a list target_modules")
    experts = [name if "experts." in name else f"experts.{name}" for name in parameters]
    return LoraConfig(
        r=given["r"],
        alpha=given["lora_alpha"],
        targets=tuple(sorted([*(name.removeprefix("model.") for name in modules), *experts])),
        use_rslora=bool(given.get("use_rslora")),
        use_dora=bool(given.get("use_dora")),
        init="pissa" if init == "pissa" else "uniform",
    )
