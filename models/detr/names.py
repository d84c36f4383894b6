"""Names of DETR's tensors: ours, the original code's, and transformers'.

Ours are the original's without its wrappers (`backbone.0.body.`, and `detr.` where there is a mask head). transformers
splits the stacked query, key and value projection in three, and names much else differently; it has the backbone either
under timm's names, which are ours, or as its own ResNet.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Of transformers' names, as they stand in its files and, since version 5, in its modules.
LAYER_PARTS = {
    "encoder": {"self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    "decoder": {
        "self_attn_layer_norm": "norm1",
        "encoder_attn_layer_norm": "norm2",
        "final_layer_norm": "norm3",
        "encoder_attn": "multihead_attn",
    },
}
TOP = {
    "input_projection": "input_proj",
    "query_position_embeddings": "query_embed",
    "decoder.layernorm": "transformer.decoder.norm",
}
HEADS = {"class_labels_classifier": "class_embed", "bbox_predictor": "bbox_embed"}
BACKBONE = "model.backbone.conv_encoder.model."
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def from_original(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names of facebookresearch/detr to ours."""
    for name, tensor in named:
        name = name.removeprefix("detr.").replace("backbone.0.body.", "backbone.", 1)
        if not name.endswith("num_batches_tracked"):
            yield name, tensor


def to_original(named: Iterable[tuple[str, Tensor]], mask_head: bool) -> Iterator[tuple[str, Tensor]]:
    """Our names to those of facebookresearch/detr."""
    for name, tensor in named:
        name = name.replace("backbone.", "backbone.0.body.", 1)
        yield (name if not mask_head or name.startswith(("mask_head.", "bbox_attention.")) else f"detr.{name}"), tensor


def from_transformers(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names of transformers' DetrForObjectDetection or DetrForSegmentation to ours, with either backbone.

    A name that is not one of theirs passes through as it is.
    """
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named:
        name = name.removeprefix("detr.")
        if name.endswith("num_batches_tracked"):
            continue
        name = _from_transformers(name)
        projection = re.fullmatch(r"(.*_attn)\.([qkv]_proj)\.(weight|bias)", name)
        if projection is None:
            yield name, tensor
            continue
        stacked = f"{projection[1]}.in_proj_{projection[3]}"
        parts = thirds.setdefault(stacked, {})
        parts[projection[2]] = tensor
        if len(parts) == len(PROJECTIONS):
            yield stacked, torch.cat([parts[p] for p in PROJECTIONS])
            del thirds[stacked]
    for stacked, parts in thirds.items():  # incomplete: handed on under their own names, for the reader to refuse
        yield from ((f"{stacked.rpartition('.')[0]}.{part}", tensor) for part, tensor in parts.items())


def _from_transformers(name: str) -> str:
    for theirs, ours in HEADS.items():
        if name.startswith(f"{theirs}."):
            return ours + name[len(theirs) :]
    for theirs, ours in TOP.items():
        if name.startswith(f"model.{theirs}."):
            return ours + name[len(f"model.{theirs}") :]
    backbone = re.fullmatch(r"model\.backbone\.(?:conv_encoder\.)?model\.(.*)", name)
    if backbone:
        return "backbone." + _from_own_resnet(backbone[1])
    layer = re.fullmatch(r"model\.(encoder|decoder)\.layers\.(\d+)\.(?:mlp\.)?(\w+)\.(.*)", name)
    if layer:
        stack, number, part, rest = layer.groups()
        part = {"fc1": "linear1", "fc2": "linear2"}.get(part, LAYER_PARTS[stack].get(part, part))
        return f"transformer.{stack}.layers.{number}.{part}.{rest.replace('o_proj.', 'out_proj.')}"
    return name


def _from_own_resnet(name: str) -> str:
    """Names within transformers' ResNet to torchvision's; those of timm's are torchvision's already."""
    stem = re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)
    if stem:
        return f"{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    block = re.fullmatch(
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.\d+)\.(convolution|normalization)\.(\w+)", name
    )
    if not block:
        return name
    stage, number, part, kind, leaf = block.groups()
    inside = f"layer{int(stage) + 1}.{number}"
    if part == "shortcut":
        return f"{inside}.downsample.{0 if kind == 'convolution' else 1}.{leaf}"
    return f"{inside}.{'conv' if kind == 'convolution' else 'bn'}{int(part.partition('.')[2]) + 1}.{leaf}"


def to_transformers(
    named: Iterable[tuple[str, Tensor]], mask_head: bool, own_resnet: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Our names to those in transformers' files, with its own ResNet as the backbone, or timm's."""
    for name, tensor in named:
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith(("mask_head.", "bbox_attention.")):
            yield name, tensor
            continue
        prefix = "detr." if mask_head else ""
        if not own_resnet and name.startswith("backbone."):
            yield f"{prefix}{BACKBONE}{name.removeprefix('backbone.')}", tensor
            continue
        stacked = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if stacked:
            for projection, third in zip(PROJECTIONS, tensor.chunk(3)):
                yield prefix + _to_transformers(f"{stacked[1]}.{projection}.{stacked[2]}"), third
        else:
            yield prefix + _to_transformers(name), tensor


def _to_transformers(name: str) -> str:
    for table, before in ((HEADS, ""), (TOP, "model.")):
        for theirs, ours in table.items():
            if name.startswith(f"{ours}."):
                return before + theirs + name[len(ours) :]
    layer = re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.*)", name)
    if layer:
        stack, number, part, rest = layer.groups()
        their_parts = {ours: theirs for theirs, ours in LAYER_PARTS[stack].items()}
        part = {"linear1": "fc1", "linear2": "fc2"}.get(part, their_parts.get(part, part))
        return f"model.{stack}.layers.{number}.{part}.{rest}"
    return BACKBONE + _to_own_resnet(name.removeprefix("backbone."))


def _to_own_resnet(name: str) -> str:
    stem = re.fullmatch(r"(conv|bn)1\.(\w+)", name)
    if stem:
        return f"embedder.embedder.{'convolution' if stem[1] == 'conv' else 'normalization'}.{stem[2]}"
    block = re.fullmatch(r"layer(\d+)\.(\d+)\.(?:downsample\.(\d)|(conv|bn)(\d))\.(\w+)", name)
    if not block:
        raise ValueError(f"{name} is not a name within a ResNet")
    stage, number, shortcut, kind, position, leaf = block.groups()
    inside = f"encoder.stages.{int(stage) - 1}.layers.{number}"
    if shortcut is not None:
        return f"{inside}.shortcut.{'convolution' if shortcut == '0' else 'normalization'}.{leaf}"
    return f"{inside}.layer.{int(position) - 1}.{'convolution' if kind == 'conv' else 'normalization'}.{leaf}"
