"""The same weights under each naming give transformers' outputs. Files in the original naming, and in timm's, are made
by renaming a transformers model's tensors to the published key lists: the real ones cannot be downloaded in a test."""

import argparse
import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DetrForObjectDetection, DetrForSegmentation, DetrImageProcessor

from models.detr.checkpoint import load_detr, save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import IMAGE_MEAN, Detr
from models.detr.names import from_original, to_original
from models.errors import UserError
from tests.models.detr.conftest import peer_model
from tests.models.detr.small import SMALL

Batch = tuple[Tensor, Tensor]


def assert_same(model: Detr, peer: Any, batch: Batch) -> None:
    images, valid = batch
    with torch.no_grad():
        ours, theirs = model(images, valid), peer(images, valid)
    assert theirs.logits.std() > 0.01
    torch.testing.assert_close(ours.logits_BQC, theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.boxes_BQ4, theirs.pred_boxes, atol=1e-4, rtol=1e-4)
    if hasattr(theirs, "pred_masks"):
        assert theirs.pred_masks.std() > 0.01
        torch.testing.assert_close(ours.masks_BQHW, theirs.pred_masks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("segmentation", [False, True])
def test_folder_of_transformers(
    segmentation: bool, box_peer: Any, mask_peer: Any, batch: Batch, tmp_path: Path
) -> None:
    peer = mask_peer if segmentation else box_peer
    peer.save_pretrained(tmp_path)
    assert_same(load_detr(tmp_path), peer, batch)


def test_without_padding(mask_peer: Any, tmp_path: Path) -> None:
    mask_peer.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = load_detr(tmp_path)(images), mask_peer(images)
    torch.testing.assert_close(ours.boxes_BQ4, theirs.pred_boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.masks_BQHW, theirs.pred_masks, atol=1e-4, rtol=1e-4)


def test_folder_with_the_names_of_transformers_modules(mask_peer: Any, batch: Batch, tmp_path: Path) -> None:
    """Version 5 renames tensors when it reads a file (o_proj, mlp.fc1); a file may hold those names too."""
    mask_peer.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in mask_peer.state_dict().items() if "mask_head" not in name}
    head = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if name.startswith("mask_head")}
    state = {
        name.replace("q_proj", "q_linear").replace("k_proj", "k_linear") if "bbox_attention" in name else name: t
        for name, t in state.items()
    }
    assert any("mlp.fc1" in name for name in state)
    save_file(state | head, tmp_path / "model.safetensors")
    assert_same(load_detr(tmp_path), mask_peer, batch)


def test_basic_blocks_and_three_stages(batch: Batch, tmp_path: Path) -> None:
    peer = peer_model(segmentation=True, layer_type="basic", stages=3)
    peer.save_pretrained(tmp_path)
    assert_same(load_detr(tmp_path), peer, batch)


def original_state(model: Detr) -> dict[str, Tensor]:
    state = dict(to_original(model.state_dict().items(), model.config.mask_head))
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("segmentation", [False, True])
def test_file_of_the_original_code(
    segmentation: bool, box_peer: Any, mask_peer: Any, batch: Batch, tmp_path: Path
) -> None:
    peer = mask_peer if segmentation else box_peer
    peer.save_pretrained(tmp_path / "peer")
    state = original_state(load_detr(tmp_path / "peer"))
    prefix = "detr." if segmentation else ""
    published = [  # of facebookresearch/detr's detr-r50 and detr-r50-panoptic
        "backbone.0.body.conv1.weight",
        "backbone.0.body.bn1.running_mean",
        "backbone.0.body.layer1.0.downsample.0.weight",
        "backbone.0.body.layer4.1.conv3.weight",
        "transformer.encoder.layers.0.self_attn.in_proj_weight",
        "transformer.encoder.layers.1.self_attn.out_proj.bias",
        "transformer.encoder.layers.0.linear1.weight",
        "transformer.encoder.layers.0.norm2.weight",
        "transformer.decoder.layers.2.multihead_attn.in_proj_bias",
        "transformer.decoder.layers.2.norm3.bias",
        "transformer.decoder.norm.weight",
        "class_embed.weight",
        "bbox_embed.layers.2.bias",
        "query_embed.weight",
        "input_proj.weight",
    ]
    assert {prefix + name for name in published} <= state.keys()
    if segmentation:
        assert {"bbox_attention.q_linear.weight", "mask_head.lay5.bias", "mask_head.adapter3.weight"} <= state.keys()
    # As main.py saves it after training: with its arguments, in a class that is no tensor.
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4, hidden_dim=32), "epoch": 3}, tmp_path / "detr.pth")
    assert_same(load_detr(tmp_path / "detr.pth"), peer, batch)


def test_original_and_ours_are_one_to_one() -> None:
    model = Detr(DetrConfig(mask_head=True, backbone=ResNetConfig("basic", (1, 1, 1), (8, 8, 8), 8)))
    there = original_state(model)
    back = dict(from_original(there.items()))
    assert back.keys() == model.state_dict().keys()


def test_folder_with_timm_names(batch: Batch, tmp_path: Path) -> None:
    """As facebook/detr-resnet-50 has them. Also tells ResNet-18's shape from its name alone."""
    resnet18 = ResNetConfig("basic", (2, 2, 2, 2), (64, 128, 256, 512))
    config = replace(SMALL, num_labels=3, mask_head=False, backbone=resnet18)
    torch.manual_seed(0)
    model = Detr(config).eval()
    save_detr(model, tmp_path)
    peer = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"use_timm_backbone": True, "backbone": "resnet18", "backbone_config": None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    state = {
        name: tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
        if not name.startswith("model.backbone.")
    }
    backbone = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("backbone.")}
    state |= {f"model.backbone.conv_encoder.model.{name.removeprefix('backbone.')}": t for name, t in backbone.items()}
    assert "model.backbone.conv_encoder.model.layer1.0.bn1.running_var" in state
    save_file(state, tmp_path / "model.safetensors")
    assert_same(load_detr(tmp_path), peer, batch)


@pytest.mark.parametrize("mask_head", [False, True])
@pytest.mark.parametrize("num_labels", [2, 4])
def test_what_we_save_transformers_loads(mask_head: bool, num_labels: int, batch: Batch, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        num_labels=num_labels,
        labels=("ant", "bee", "cat", "dog")[:num_labels],
        mask_head=mask_head,
        backbone=ResNetConfig("basic", (1, 1, 1, 1), (8, 16, 16, 24), 8),
    )
    torch.manual_seed(0)
    model = Detr(config, freeze_batch_norm=False)
    model.train()(batch[0])  # running statistics that say something
    model.eval()
    save_detr(model, tmp_path)
    kind = DetrForSegmentation if mask_head else DetrForObjectDetection
    peer, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert peer.config.id2label[1] == "bee"
    assert_same(model, peer.eval(), batch)
    loaded = load_detr(tmp_path)
    assert loaded.config == config
    assert_same(loaded, peer, batch)
    assert DetrImageProcessor.from_pretrained(tmp_path).image_mean == IMAGE_MEAN
    peer.save_pretrained(tmp_path / "again")
    assert load_detr(tmp_path / "again").config == config


def test_half_precision_on_disk(box_peer: Any, batch: Batch, tmp_path: Path) -> None:
    box_peer.save_pretrained(tmp_path / "whole")
    model = load_detr(tmp_path / "whole")
    save_detr(model, tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    again = load_detr(tmp_path / "half")
    assert again.class_embed.weight.dtype == torch.float32
    with torch.no_grad():
        difference = (again(*batch).boxes_BQ4 - model(*batch).boxes_BQ4).abs().max()
    assert 0 < difference < 0.02


class Malice:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_bad_input(box_peer: Any, tmp_path: Path) -> None:
    def refused(pattern: str, path: Path) -> None:
        with pytest.raises(UserError, match=pattern):
            load_detr(path)

    refused("no such DETR", tmp_path / "nowhere")
    folder = tmp_path / "folder"
    box_peer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    key = "model.decoder.layers.0.self_attn.k_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, folder / "model.safetensors")
    refused(r"unexpected tensor .*self_attn", folder)
    key = "model.input_projection.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, folder / "model.safetensors")
    refused("tensor input_proj.weight is missing", folder)
    save_file(weights | {key: torch.zeros(3, 3)}, folder / "model.safetensors")
    refused(r"input_proj.weight has shape \[3, 3\]", folder)
    (folder / "model.safetensors").write_bytes(b"\x00\x01")
    refused("not a whole safetensors file", folder)
    for change, pattern in [
        ({"model_type": "yolos"}, "model_type is 'yolos'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
        ({"backbone_config": {"model_type": "swin"}}, "a backbone of type 'swin'"),
        ({"backbone_config": None, "backbone": "resnext50"}, "backbone 'resnext50'"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(pattern, folder)

    torch.save({"model": {"class_embed.weight": torch.zeros(3, 3)}}, tmp_path / "part.pth")
    refused("tensor backbone.conv1.weight is missing|is missing", tmp_path / "part.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    refused("holds no tensors by name", tmp_path / "none.pth")
    torch.save({"model": Malice()}, tmp_path / "evil.pth")
    refused("cannot be read as weights", tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "part.pth").read_bytes()[:300])
    refused("cannot be read as weights", tmp_path / "cut.pth")


def test_a_dilated_model_of_the_original_code(batch: Batch, tmp_path: Path) -> None:
    """Its tensors are those of a plain one: the arguments beside them tell, or else whoever loads it."""
    resnet18 = ResNetConfig("basic", (2, 2, 2, 2), (64, 128, 256, 512), 64, dilation=True)
    config = replace(SMALL, mask_head=False, encoder_attention_heads=4, decoder_attention_heads=4, backbone=resnet18)
    torch.manual_seed(0)
    model = Detr(config).eval()
    file = tmp_path / "dc5.pth"

    def outputs(loaded: Detr) -> Tensor:
        with torch.no_grad():
            return loaded(*batch).logits_BQC

    arguments = argparse.Namespace(dilation=True, nheads=4, position_embedding="sine", pre_norm=False)
    torch.save({"model": original_state(model), "args": arguments}, file)
    assert load_detr(file).config == config
    torch.testing.assert_close(outputs(load_detr(file)), outputs(model))
    save_detr(load_detr(file), tmp_path / "folder")  # for timm's ResNet: transformers' own has no dilation
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (written["backbone"], written["dilation"], written["use_timm_backbone"]) == ("resnet18", True, True)
    assert load_detr(tmp_path / "folder").config == config
    torch.testing.assert_close(outputs(load_detr(tmp_path / "folder")), outputs(model))

    torch.save({"model": original_state(model)}, file)  # as published
    assert load_detr(file, dilation=True).config.backbone == resnet18
    assert not load_detr(file).config.backbone.dilation

    torch.save({"model": original_state(model), "args": argparse.Namespace(dilation=False)}, file)
    with pytest.raises(UserError, match="says that its backbone is not dilated"):
        load_detr(file, dilation=True)
    for name, value in (("pre_norm", True), ("position_embedding", "learned")):
        torch.save({"model": original_state(model), "args": argparse.Namespace(**{name: value})}, file)
        with pytest.raises(UserError, match=f"was trained with {name} {value!r}"):
            load_detr(file)


def test_a_folder_that_does_not_say_how_many_labels_has_two(tmp_path: Path) -> None:
    """transformers writes neither id2label nor num_labels where they are its defaults."""
    peer = peer_model(num_labels=2)
    peer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("id2label", "label2id", "num_labels"):
        content.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_detr(tmp_path).config.num_labels == DetrForObjectDetection.from_pretrained(tmp_path).config.num_labels


def test_a_dilated_backbone_that_is_none_of_timms_cannot_be_saved(tmp_path: Path) -> None:
    config = DetrConfig(backbone=ResNetConfig("basic", (1, 1), (8, 16), 8, dilation=True))
    with pytest.raises(UserError, match="DC5"):
        save_detr(Detr(config), tmp_path)


def test_keys_are_published_ones_at_full_size() -> None:
    """DETR-R50 has 41.5M parameters (paper, table 1: 41M)."""
    with torch.device("meta"):
        model = Detr(DetrConfig())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(41.5, abs=0.05)
    assert len([name for name in model.state_dict() if re.match(r"backbone\.layer\d\.\d+\.conv\d\.weight", name)]) == 48


def test_a_saved_model_may_be_read_by_whoever_may_read_its_folder(box_peer: Any, tmp_path: Path) -> None:
    save_detr(Detr(SMALL), tmp_path / "model")
    modes = {file.name: stat.filemode(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
