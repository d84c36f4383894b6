"""Adapters on the UNet: diffusers reads ours, we read theirs, and both draw the same."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig as PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from models.diffusion.lora import ATTENTION, WEIGHTS, adapters, attach_lora, load_lora, merge_lora, save_lora
from models.diffusion.unet import UNet
from models.errors import UserError
from models.language.lora import LoraConfig
from tests.models.diffusion.small_models import unets

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CONFIG = LoraConfig(r=3, alpha=12.0, targets=ATTENTION)


def draw(unet: UNet | UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 24)))
    with torch.no_grad():
        y = unet(x, 7, context)
    return y if isinstance(y, torch.Tensor) else y.sample


def trained_adapter(unet: UNet) -> UNet:
    """As after some training: B is no longer zero."""
    attach_lora(unet, CONFIG, seed=0)
    for seed, layer in enumerate(adapters(unet).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(seed))
    return unet


def test_a_new_adapter_changes_nothing_and_alone_is_trained() -> None:
    ours, reference = unets()
    attach_lora(ours, CONFIG, seed=0)
    torch.testing.assert_close(draw(ours), draw(reference), rtol=1e-4, atol=1e-4)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.adapters.default.weight.lora_{part}" for name in adapters(ours) for part in "AB"}
    assert len(adapters(ours)) == 11 * 2 * 4  # transformers × attentions × projections


def test_diffusers_reads_our_adapter(tmp_path: Path) -> None:
    ours, reference = unets()
    before = draw(ours)
    trained_adapter(ours)
    save_lora(ours, tmp_path)
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_unet(state, None, reference, metadata=metadata)
    torch.testing.assert_close(draw(ours), draw(reference), **TOLERANCE)
    assert (draw(ours) - before).abs().max() > 0.01


@pytest.mark.parametrize("with_metadata", [True, False], ids=["alpha", "no alpha"])
def test_we_read_diffusers_adapter(tmp_path: Path, with_metadata: bool) -> None:
    ours, reference = unets()
    config = PeftConfig(r=3, lora_alpha=12 if with_metadata else 3, target_modules=["to_q", "ff.net.2", "to_out.0"])
    config.init_lora_weights = False
    torch.manual_seed(0)
    reference.add_adapter(config)
    metadata = config.to_dict() | {"target_modules": sorted(config.target_modules)} if with_metadata else None
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(reference), unet_lora_adapter_metadata=metadata
    )
    load_lora(ours, tmp_path)
    torch.testing.assert_close(draw(ours), draw(reference), **TOLERANCE)


def test_names_of_diffusers_before_peft(tmp_path: Path) -> None:
    ours, _ = unets()
    expected = draw(trained_adapter(ours))
    save_lora(ours, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for name, t in tensors.items()}
    scaled = {name: tensor * 4 if "lora.up" in name else tensor for name, tensor in old.items()}  # no α: it is r
    save_file(scaled, tmp_path / WEIGHTS)
    again, _ = unets()
    load_lora(again, tmp_path)
    torch.testing.assert_close(draw(again), expected, **TOLERANCE)


def test_names_of_attention_processors(tmp_path: Path) -> None:
    """As files of diffusers 0.14 to 0.20 have them; its later versions read them, and so do we."""
    ours, reference = unets()
    before = draw(ours)
    save_lora(trained_adapter(ours), tmp_path)
    old = {}
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        attention, _, rest = name.replace("to_out.0", "to_out").rpartition(".to_")
        layer, part = rest.removesuffix(".weight").split(".lora_")
        old[f"{attention}.processor.to_{layer}_lora.{'down' if part == 'A' else 'up'}.weight"] = tensor
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in old
    save_file(old, tmp_path / WEIGHTS)
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, reference)
    again, _ = unets()
    load_lora(again, tmp_path)
    torch.testing.assert_close(draw(again), draw(reference), **TOLERANCE)
    assert len(adapters(again)) == len(adapters(ours))
    assert (draw(again) - before).abs().max() > 0.01


def test_merged(tmp_path: Path) -> None:
    ours, _ = unets()
    names = set(ours.state_dict())
    trained_adapter(ours)
    merged = copy.deepcopy(ours)
    merge_lora(merged)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(draw(merged), draw(ours), **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {"text_encoder.x.lora_A.weight": torch.zeros(1)}, "text_encoder"),
        (lambda t: {"unet.conv_in.lora_A.weight": torch.zeros(1)}, "no Linear conv_in"),
        (lambda t: {name: x for name, x in t.items() if "lora_A" in name}, "has no lora_B"),
        (lambda t: {name: torch.zeros(3, 5) for name in t}, "has shapes"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_misfits_are_named(tmp_path: Path, change, named: str) -> None:
    ours, _ = unets()
    save_lora(trained_adapter(ours), tmp_path)
    save_file(change(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=named):
        load_lora(unets()[0], tmp_path)


def test_unknown_targets_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q_proj"):
        attach_lora(unets()[0], LoraConfig(targets=("q_proj",)), seed=0)
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: missing"):
        load_lora(unets()[0], tmp_path)
