"""DETR checkpoints in and out: transformers' folders, and the original code's .pth files (weights only). And trained
backbones in."""

import argparse
import pickle
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.detr.config import DetrConfig, ResNetConfig, from_hf, to_hf
from models.detr.detr import IMAGE_MEAN, IMAGE_STD, Detr
from models.detr.names import from_original, from_transformers, to_transformers
from models.errors import UserError
from models.language.checkpoint import read_json, read_tensors, write_json, write_tensors

ORIGINAL_HEADS = 8  # of every published model; the tensors do not tell
MADE_OTHERWISE = {"pre_norm": False, "position_embedding": "sine"}  # arguments of the original that must be so


def load_detr(path: str | Path, dilation: bool = False) -> Detr:
    """Read a folder of transformers (either backbone), or a .pth file of the original code (`{"model": ...}`).

    dilation: a .pth that does not hold the arguments of its training is of a DC5 model, whose tensors are those of a
    plain one. In float32 on the CPU, in eval mode, with frozen batch norm. Raises UserError for anything missing,
    broken, misfit, and for a dilation that the file denies.
    """
    path = Path(path)
    if path.is_dir():
        config = from_hf(read_json(path / "config.json"), str(path / "config.json"))
        named = dict(from_transformers(read_tensors(path)))
    elif path.is_file():
        state, arguments = _read_pth(path)
        named = dict(from_original(state.items()))
        heads, dilated = _heads_and_dilation(arguments, dilation, str(path))
        config = infer_config(named, str(path), dilated, heads)
    else:
        raise UserError(f"{path}: no such DETR; give a folder of transformers, or a .pth file of the original code")
    if dilation and not config.backbone.dilation:
        raise UserError(f"{path}: says that its backbone is not dilated; leave out the flag that says it is")
    model = Detr(config)
    fill(model, named.items(), str(path))
    return model.eval()


def read_backbone(path: str | Path) -> tuple[ResNetConfig, dict[str, Tensor]]:
    """Read a ResNet's weights under torchvision's names (timm's are the same): a .safetensors file, or a .pth one of
    tensors alone. Returns its shape, and its tensors for `fill`, without the classifier's.

    Raises UserError for a file that is missing, broken, or no ResNet.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of backbone weights; give a ResNet's .pth or .safetensors")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_pth(path)[0]
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None
    named = {n: t for n, t in state.items() if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    try:
        return infer_backbone(named), named
    except KeyError as missing:
        raise UserError(f"{path}: tensor {missing.args[0]} is missing; is it a ResNet of torchvision?") from None


@torch.no_grad()
def fill(model: nn.Module, named: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copy tensors under our names into a model. Raises UserError naming the first that is missing or does not fit."""
    slots = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    waiting = set(slots)
    for name, tensor in named:
        if name not in slots:
            raise UserError(f"{source}: unexpected tensor {name}; is this a DETR with a ResNet?")
        if slots[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}, but the configuration asks for "
                f"{list(slots[name].shape)}"
            )
        slots[name].copy_(tensor)
        waiting.discard(name)
    if waiting:
        raise UserError(f"{source}: tensor {min(waiting)} is missing ({len(waiting)} in all); is the file whole?")


def save_detr(model: Detr, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that `DetrForObjectDetection.from_pretrained` (`DetrForSegmentation`) loads, without timm; with
    timm if the backbone is dilated (DC5), which transformers' own ResNet cannot be.

    Raises UserError if the folder cannot be written, or a dilated backbone is none of timm's.
    """
    folder = Path(folder)
    content = to_hf(model.config)
    named = model.state_dict().items()
    tensors = dict(to_transformers(named, model.config.mask_head, own_resnet=not model.config.backbone.dilation))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.detach().cpu().to(dtype).contiguous().clone() for name, tensor in tensors.items()}
        write_tensors(folder / "model.safetensors", whole)
        write_json(folder / "config.json", {**content, "dtype": str(dtype).removeprefix("torch.")})
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the model ({error}); free some space or choose another folder"
        ) from None


PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "DetrImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "do_pad": True,
}


def _read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the arguments of the training that made them; none where the file does not hold them."""
    try:
        # Training checkpoints hold their arguments beside the weights, as a Namespace: a class without behaviour.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as weights ({line}); download it again") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no tensors by name, at the top or under `model`; is it a checkpoint?")
    arguments = content.get("args")
    return state, vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _heads_and_dilation(arguments: dict[str, Any], dilation: bool, source: str) -> tuple[int, bool]:
    """What tensors do not tell, from the arguments of facebookresearch/detr's main.py; without them as asked for.

    Raises UserError for a model that ours is not.
    """
    for name, wanted in MADE_OTHERWISE.items():
        if arguments.get(name, wanted) != wanted:
            raise UserError(f"{source}: was trained with {name} {arguments[name]!r}; only {wanted!r} is supported")
    return arguments.get("nheads", ORIGINAL_HEADS), bool(arguments.get("dilation", dilation))


def infer_config(
    named: dict[str, Tensor], source: str, dilation: bool = False, heads: int = ORIGINAL_HEADS
) -> DetrConfig:
    """The shape of a model from its tensors (under our names), for checkpoints that come without a configuration.

    Neither heads nor a dilated backbone (DC5) show in the tensors.
    """
    try:
        backbone = infer_backbone(named, "backbone.", dilation)
        queries, dim = named["query_embed.weight"].shape
        plain = DetrConfig(
            num_labels=len(named["class_embed.weight"]) - 1,
            num_queries=queries,
            d_model=dim,
            encoder_layers=_count(named, r"transformer\.encoder\.layers\.(\d+)\."),
            decoder_layers=_count(named, r"transformer\.decoder\.layers\.(\d+)\."),
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            mask_head="mask_head.out_lay.weight" in named,
            backbone=backbone,
        )
        return replace(
            plain,
            encoder_ffn_dim=len(named["transformer.encoder.layers.0.linear1.weight"]),
            decoder_ffn_dim=len(named["transformer.decoder.layers.0.linear1.weight"]),
        )
    except KeyError as missing:
        raise UserError(f"{source}: tensor {missing.args[0]} is missing; is it a DETR of the original code?") from None


def infer_backbone(named: dict[str, Tensor], prefix: str = "", dilation: bool = False) -> ResNetConfig:
    """The shape of a ResNet from its tensors under torchvision's names. Raises KeyError, naming one that it has not."""
    stem = len(named[f"{prefix}conv1.weight"])
    stages = max(1, _count(named, rf"{re.escape(prefix)}layer(\d+)\."))
    depths = tuple(_count(named, rf"{re.escape(prefix)}layer{i + 1}\.(\d+)\.") for i in range(stages))
    bottleneck = f"{prefix}layer1.0.conv3.weight" in named
    last = "conv3" if bottleneck else "conv2"
    widths = tuple(len(named[f"{prefix}layer{i + 1}.0.{last}.weight"]) for i in range(stages))
    return ResNetConfig("bottleneck" if bottleneck else "basic", depths, widths, stem, dilation)


def _count(named: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for found in map(re.compile(pattern).match, named) if found})
