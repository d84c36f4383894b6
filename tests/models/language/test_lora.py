"""LoRA against peft: the same adapter files, the same outputs, the same merged weights."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.errors import UserError
from models.language.checkpoint import load_pretrained, save_pretrained, to_checkpoint
from models.language.decoder import Decoder
from models.language.lora import LoraConfig, adapters, attach, load_adapter, merge, save_adapter, unmerge
from models.language.packing import Packing
from tests.models.language.policies import DENSE, HYBRID, MOE

LORA = LoraConfig(r=4, alpha=12.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
TOKENS = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(0))


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, Packing.of([30])))


def trained(config: object = DENSE, lora: LoraConfig = LORA) -> Decoder:
    """A model with adapters that do something."""
    model = Decoder(config).init_weights(0)
    attach(model, lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.3, generator=generator)
    return model


def test_peft_reads_our_adapter(tmp_path: Path) -> None:
    save_pretrained(Decoder(DENSE).init_weights(0), tmp_path / "base")
    model = trained()
    save_adapter(model, tmp_path / "adapter", LORA)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = base(TOKENS[None]).logits[0]
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        theirs = wrapped(TOKENS[None]).logits[0]
        assert (theirs - plain).abs().max() > 0.1
        torch.testing.assert_close(logits(model), theirs, atol=1e-5, rtol=1e-5)
        whole = wrapped.merge_and_unload().state_dict()
    merged = dict(to_checkpoint(model))
    assert merged.keys() == whole.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=0)


def test_we_read_the_adapter_of_peft(tmp_path: Path) -> None:
    save_pretrained(Decoder(DENSE).init_weights(0), tmp_path / "base")
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["k_proj", "gate_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_pretrained(tmp_path / "base")
    plain = logits(model)
    assert load_adapter(model, tmp_path / "adapter") == LoraConfig(3, 7, ("gate_proj", "k_proj"))
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [DENSE, MOE, HYBRID], ids=["dense", "moe", "hybrid"])
def test_merging_changes_nothing_but_speed(config: object, tmp_path: Path) -> None:
    targets = ("q_proj", "g_proj") if config is HYBRID else ("q_proj",)
    model = trained(config, LoraConfig(r=4, alpha=8, targets=targets))
    before = {name: tensor.clone() for name, tensor in to_checkpoint(model)}
    expected = logits(model)
    stored = {name: p.clone() for name, p in model.named_parameters()}
    save_pretrained(model, tmp_path)  # exporting leaves the model alone
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())
    torch.testing.assert_close(logits(load_pretrained(tmp_path)), expected, atol=2e-5, rtol=0)

    merge(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in to_checkpoint(model))
    merge(model)  # a second time does nothing
    assert all(torch.equal(before[name], tensor) for name, tensor in to_checkpoint(model))
    unmerge(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, stored[name], atol=1e-6, rtol=0)


def test_only_adapters_train_and_start_without_effect() -> None:
    model = Decoder(HYBRID).init_weights(0)
    before = logits(model)
    attach(model, LoraConfig(r=2, alpha=4, targets=("q_proj", "g_proj")), seed=0)
    assert torch.equal(logits(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    names = ("layers.0.self_attn.q_proj", "layers.0.self_attn.g_proj", "layers.1.self_attn.q_proj")
    assert {f"{name}.lora_{x}" for name in names for x in "AB"} <= trainable
    assert all(".lora_" in name for name in trainable)
    model.logits(model(TOKENS, Packing.of([30]))).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(targets=("query",)), "no layer is named 'query'"),
        (LoraConfig(targets=("gate",)), "no layer is named 'gate'"),  # the router computes in float32, by itself
        (LoraConfig(targets=()), "targets is empty"),
        (LoraConfig(r=0), "r is 0"),
    ],
)
def test_bad_settings(lora: LoraConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(Decoder(MOE).init_weights(0), lora, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"target_modules": "all-linear"}, "list target_modules"),
        ({"target_modules": ["q_proj"]}, "does not belong to this model"),
        ({"r": 2}, "has shape"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
)
def test_adapters_that_do_not_fit(changes: dict, message: str, tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path, LORA)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)


def test_broken_adapter_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: missing"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)
    save_adapter(trained(), tmp_path, LORA)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="only safetensors adapters are read"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)
