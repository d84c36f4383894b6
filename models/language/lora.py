"""Adapters on a model: attach several by name, let one of them act, merge it into the weights and take it out again.

What an adapter computes is in lora_layers.py and lora_experts.py; the files it is kept in, in peft_folder.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.errors import UserError, unknown_name
from models.language.decoder import Decoder
from models.language.experts import Experts
from models.language.lora_experts import LoraExperts, require_expert_settings
from models.language.lora_layers import Adapted, LoraConfig, LoraLinear, LowRank

__all__ = ["LoraConfig", "activate", "adapted_layers", "attach", "fold", "merge", "merged_weights", "parts", "unmerge"]

ALL_LINEAR = "all-linear"
EXPERT_TARGETS = ("experts.gate_up_proj", "experts.down_proj")


def attach(model: Decoder, config: LoraConfig, seed: int, name: str = "default") -> None:
    """Put an adapter beside every targeted weight, let it act, and freeze everything else.

    The model's outputs stay as they are without an adapter. Raises UserError for settings that cannot be, an unknown
    target, or a name that is taken.
    """
    targets = checked_targets(model, config)
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise UserError(f"lora: an adapter cannot be named {name!r}; use a word of letters, digits and underscores")
    if name in adapter_names(model):
        raise UserError(f"lora: the model already has an adapter named {name!r}; choose another name")
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise ValueError("unmerge before attaching another adapter: it would be fitted to the merged weights")
    generator = torch.Generator().manual_seed(seed)
    for module_name, part in targets:
        _adapted(model, module_name).add(name, part, config, generator)
    activate(model, name)


def checked_targets(model: Decoder, config: LoraConfig) -> list[tuple[str, str]]:
    """(layer, part) of each weight that the adapter stands beside. Raises UserError for settings that cannot be."""
    targets = _find(model, config.validate().targets)
    if any(part != "weight" for _, part in targets):
        require_expert_settings(config, model.embed_tokens.weight.element_size())
    for name, part in targets if config.init == "pissa" else []:
        shape = model.get_submodule(name).get_parameter(part).shape[-2:]
        if config.r > min(shape):
            raise UserError(
                f"lora: init 'pissa' starts from the first {config.r} singular vectors, and {name} of shape "
                f"{tuple(shape)} has {min(shape)}: use a rank of at most {min(shape)}, or init 'uniform'"
            )
    return targets


def activate(model: Decoder, name: str | None) -> None:
    """Let this adapter act and train, and no other; with None the model is the base model, and nothing trains.

    Raises UserError for an unknown name.
    """
    if name is not None and name not in adapter_names(model):
        raise unknown_name("adapter", name, adapter_names(model))
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("unmerge before activating another adapter")
    model.requires_grad_(False)
    for layer in layers.values():
        layer.active = name
        for adapter in layer.parts(name).values():
            for parameter in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude):
                if parameter is not None:
                    parameter.requires_grad_(True)


def adapted_layers(model: Decoder) -> dict[str, Adapted]:
    """The layers that have adapters, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_names(model: Decoder) -> list[str]:
    return sorted({name for layer in adapted_layers(model).values() for name in layer.adapters})


def parts(model: Decoder, name: str) -> Iterator[tuple[str, str, LowRank]]:
    """Layer, part ("weight" of a Linear) and trained tensors of an adapter, in the order of the model's layers."""
    for layer_name, layer in adapted_layers(model).items():
        for part, adapter in layer.parts(name).items():
            yield layer_name, part, adapter


def merged_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the base model by its name, the active adapter added in; the model is left as it
    is, and a weight without an adapter is its own storage."""
    layers = adapted_layers(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer_name, _, part = name.rpartition(".")
        if ".adapters." not in name:
            yield name, layers[layer_name].merged_weight(part) if layer_name in layers else tensor.detach()


def merge(model: Decoder) -> None:
    """Add the active adapter to the weights, so that the forward pass costs no more than without it."""
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: Decoder) -> None:
    """Undo `merge`, up to rounding in the weights' dtype."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def fold(model: Decoder) -> None:
    """Merge the active adapter for good: the model has no adapters any more, and every weight trains again."""
    for layer in adapted_layers(model).values():
        layer.fold()
    model.train_all()


def learning_rate_ratios(model: Decoder, ratio: float) -> dict[str, float]:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B learns `ratio` times as fast as A.

    By parameter name, for the optimizer.
    """
    if ratio <= 0:
        raise UserError(f"lora: the learning-rate ratio of LoRA+ is {ratio}; it must be positive (1 is plain LoRA)")
    return {name: ratio for name, _ in model.named_parameters() if name.endswith(".lora_B")}


def _find(model: Decoder, targets: tuple[str, ...]) -> list[tuple[str, str]]:
    """(layer, part) of each weight that a target names. Raises UserError for a target that names none."""
    weights = [
        (name, "weight", name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            weights += [(name, part, f"{name}.{part}") for part in ("gate_up_proj", "down_proj")]
    known = {name.rpartition(".")[2] for name, part, _ in weights if part == "weight"} | {ALL_LINEAR}
    if any(part != "weight" for _, part, _ in weights):
        known |= set(EXPERT_TARGETS)
    if not targets:
        raise UserError(f"lora: targets is empty; name some of {', '.join(sorted(known))}")
    found: list[tuple[str, str]] = []
    for target in targets:
        hits = [(name, part) for name, part, path in weights if _names(target, part, path)]
        if not hits:
            raise unknown_name("lora target", target, known)
        found += hits
    return [(name, part) for name, part, _ in weights if (name, part) in found]


def _names(target: str, part: str, path: str) -> bool:
    if target == ALL_LINEAR:
        return part == "weight"
    if part != "weight" and not target.endswith(f"experts.{part}"):
        return False  # `down_proj` alone is the Linear of that name
    return f".{path}".endswith(f".{target}")


def _adapted(model: Decoder, name: str) -> Adapted:
    """The layer, made ready for adapters."""
    layer = model.get_submodule(name)
    if isinstance(layer, Adapted):
        return layer
    adapted = LoraLinear(layer) if isinstance(layer, nn.Linear) else LoraExperts(layer)  # type: ignore[arg-type]
    adapted.train(layer.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, adapted)
    return adapted
