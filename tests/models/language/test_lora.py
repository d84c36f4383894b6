"""The LoRA family against peft: the same files, outputs, gradients and merged weights."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.errors import UserError
from models.language.checkpoint import load_pretrained, save_pretrained, to_checkpoint
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.lora import LoraConfig, activate, attach, fold, learning_rate_ratios, merge, parts, unmerge
from models.language.lora_layers import adapted_row_norms, row_norms
from models.language.packing import Packing
from models.language.peft_folder import adapter_tensors, load_adapter, save_adapter
from tests.models.language.policies import DENSE, HYBRID, MOE, RECURRENT

LINEARS = ("q_proj", "v_proj", "o_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LORA = LoraConfig(r=4, alpha=12.0, targets=LINEARS)
MOE = dataclasses.replace(MOE, mlp_only_layers=(1,))
# name: (policy, adapter)
FAMILY = {
    "lora": (DENSE, LORA),
    "rslora": (DENSE, dataclasses.replace(LORA, use_rslora=True)),
    "dora": (DENSE, dataclasses.replace(LORA, use_dora=True)),
    "pissa": (DENSE, dataclasses.replace(LORA, init="pissa")),
    "pissa, rslora": (DENSE, dataclasses.replace(LORA, init="pissa", use_rslora=True)),
    "all linears": (DENSE, dataclasses.replace(LORA, targets=("all-linear",))),
    "experts": (MOE, dataclasses.replace(LORA, targets=(*ATTENTION, *EXPERTS))),
    "experts' down_proj": (MOE, dataclasses.replace(LORA, targets=EXPERTS[1:])),
    "experts, pissa": (MOE, dataclasses.replace(LORA, targets=EXPERTS, init="pissa")),
}  # fmt: skip
TOKENS = torch.randint(0, 97, (30,), generator=torch.Generator().manual_seed(0))


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, Packing.of([30])))


def move(model: Decoder, name: str = "default", seed: int = 2, std: float = 0.2) -> None:
    """Make an adapter do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapter in parts(model, name):
            adapter.lora_B.add_(torch.empty(adapter.lora_B.shape).normal_(std=std, generator=generator))
            if adapter.lora_magnitude is not None:
                shape = adapter.lora_magnitude.shape
                adapter.lora_magnitude.mul_(1 + torch.empty(shape).uniform_(-0.3, 0.3, generator=generator))


def trained(config: LanguageConfig = DENSE, lora: LoraConfig = LORA) -> Decoder:
    model = Decoder(config).init_weights(0)
    attach(model, lora, seed=1)
    move(model)
    return model


@pytest.fixture(params=FAMILY)
def kind(request: pytest.FixtureRequest) -> tuple[LanguageConfig, LoraConfig]:
    return FAMILY[request.param]


def test_peft_reads_our_adapter(kind: tuple[LanguageConfig, LoraConfig], tmp_path: Path) -> None:
    config, lora = kind
    save_pretrained(Decoder(config).init_weights(0), tmp_path / "base")
    model = trained(config, lora)
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = base(TOKENS[None]).logits[0]
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        theirs = wrapped(TOKENS[None]).logits[0]
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model), theirs, atol=1e-5, rtol=1e-5)
    if config is DENSE:  # transformers keeps experts stacked
        whole = wrapped.merge_and_unload().state_dict()
        merged = dict(to_checkpoint(model))
        assert merged.keys() == whole.keys()
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, whole[name], atol=2e-6, rtol=0)


THEIRS = {
    "lora": (DENSE, {"target_modules": ["k_proj", "gate_proj"], "lora_dropout": 0.1}),
    "rslora": (DENSE, {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}),
    "dora": (DENSE, {"target_modules": ["k_proj", "gate_proj"], "use_dora": True}),
    "pissa": (DENSE, {"target_modules": ["k_proj", "gate_proj"], "init_lora_weights": "pissa"}),
    "all linears": (DENSE, {"target_modules": "all-linear"}),
    "experts": (MOE, {"target_modules": ["k_proj"], "target_parameters": [f"mlp.{name}" for name in EXPERTS]}),
    "experts alone": (MOE, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_the_adapter_of_peft(name: str, tmp_path: Path) -> None:
    config, changes = THEIRS[name]
    save_pretrained(Decoder(config).init_weights(0), tmp_path / "base")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | changes)
    theirs = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_pretrained(tmp_path / "base")
    plain = logits(model)
    lora = load_adapter(model, tmp_path / "adapter")
    assert (lora.r, lora.alpha) == (4, 7)
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "experts"])
def test_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    config, lora = FAMILY[name]
    save_pretrained(Decoder(config).init_weights(0), tmp_path / "base")
    model = trained(config, lora)
    save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    model.logits(model(TOKENS, Packing.of([30]))).log_softmax(-1)[:, 5].mean().backward()
    theirs(TOKENS[None]).logits[0].log_softmax(-1)[:, 5].mean().backward()
    named = {parameter_name: p.grad for parameter_name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():  # in the place of the tensors, so that they get peft's names and layout
        for _, _, adapter in parts(model, "default"):
            for parameter in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude):
                if parameter is not None:
                    parameter.copy_(parameter.grad)
    ours = dict(adapter_tensors(model))
    assert len(ours) == len(named)
    for key, grad in ours.items():
        stem = key.removesuffix(".weight")
        expected = named.get(f"{stem}.default.weight")
        assert expected is not None
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_merging_changes_nothing_but_speed(kind: tuple[LanguageConfig, LoraConfig], tmp_path: Path) -> None:
    model = trained(*kind)
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


@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_learns(kind: tuple[LanguageConfig, LoraConfig], seed: int) -> None:
    """Thirty random tokens by heart, from a policy that knows nothing."""
    model = Decoder(dataclasses.replace(kind[0], initializer_range=0.1)).init_weights(seed)
    attach(model, dataclasses.replace(kind[1], r=8), seed)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        logits_TV = model.logits(model(TOKENS, Packing.of([30])))
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], TOKENS[1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[0] > 4.0
    assert losses[-1] < 0.5 * losses[0]


def test_folding_leaves_a_plain_model(kind: tuple[LanguageConfig, LoraConfig]) -> None:
    model = trained(*kind)
    expected = logits(model)
    merged = {name: tensor.clone() for name, tensor in to_checkpoint(model)}
    fold(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in Decoder(kind[0]).named_parameters()
    }
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(merged[name], tensor) for name, tensor in to_checkpoint(model))
    attach(model, kind[1], seed=3)  # it can have adapters again, of the same name


def test_only_adapters_train_and_start_without_effect(kind: tuple[LanguageConfig, LoraConfig]) -> None:
    config, lora = kind
    model = Decoder(config).init_weights(0)
    before = logits(model)
    attach(model, lora, seed=0)
    torch.testing.assert_close(
        logits(model), before, atol=0 if lora.init == "uniform" and not lora.use_dora else 1e-5, rtol=0
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} <= {"lora_A", "lora_B", "lora_magnitude"}
    model.logits(model(TOKENS, Packing.of([30]))).log_softmax(-1)[:, 5].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable


def test_dora_in_bfloat16_starts_without_effect_and_scales_exactly() -> None:
    """Rows' lengths in bfloat16 would be off by up to 0.2% at the start, and their ratios have steps of 0.8%."""
    model = Decoder(DENSE).init_weights(0).bfloat16()
    before = logits(model)
    attach(model, FAMILY["dora"][1], seed=0)
    assert torch.equal(logits(model), before)
    layer = model.get_submodule("layers.0.self_attn.q_proj")
    x = torch.randn(64, DENSE.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        plain = layer(x).float()
        layer.parts("default")["weight"].lora_magnitude.mul_(1.0118)
        moved = layer(x).float()
    assert (moved.norm() / plain.norm()).item() == pytest.approx(1.0118, abs=1e-3)


def test_folding_leaves_random_features_untrained() -> None:
    model = Decoder(RECURRENT).init_weights(0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    attach(model, dataclasses.replace(LORA, targets=("q_proj",)), seed=0)
    fold(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any(name.endswith(".projection") for name in trainable)


def test_pissa_starts_from_the_first_singular_vectors() -> None:
    model = Decoder(DENSE).init_weights(0)
    attach(model, LoraConfig(r=3, alpha=6, targets=("q_proj",), init="pissa"), seed=0)
    for layer, _, adapter in parts(model, "default"):
        weight = model.get_submodule(layer).weight.detach()
        principal = adapter.scaling * adapter.lora_B.detach() @ adapter.lora_A.detach()
        singular = torch.linalg.svdvals(weight)
        residual = torch.linalg.svdvals(weight - principal)
        torch.testing.assert_close(residual[:-3], singular[3:], atol=1e-5, rtol=0)
        assert residual[-3:].abs().max() < 1e-5


def test_several_adapters_side_by_side(tmp_path: Path) -> None:
    alone = {}
    for name, lora in (("first", LORA), ("second", dataclasses.replace(LORA, use_dora=True, r=2, targets=("k_proj",)))):
        model = Decoder(DENSE).init_weights(0)
        attach(model, lora, seed=1, name=name)
        move(model, name)
        save_adapter(model, tmp_path / name, name)
        alone[name] = logits(model)
    model = Decoder(DENSE).init_weights(0)
    base = logits(model)
    load_adapter(model, tmp_path / "first", "first")
    load_adapter(model, tmp_path / "second", "second")
    for name in ("second", "first", "second"):
        activate(model, name)
        assert torch.equal(logits(model), alone[name])
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f".adapters.{name}." in n for n in trainable)
    merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        activate(model, "first")
    unmerge(model)
    activate(model, None)
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="unknown adapter `secnd`: did you mean `second`"):
        activate(model, "secnd")
    with pytest.raises(UserError, match="already has an adapter named 'first'"):
        attach(model, LORA, seed=0, name="first")
    with pytest.raises(UserError, match="cannot be named"):
        attach(model, LORA, seed=0, name="keys")


def test_norms_of_adapted_rows_without_the_adapted_matrix() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(40, 24), torch.randn(4, 24), torch.randn(40, 4)
    weight[3], b[3] = 0, 0
    expected = (weight.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(adapted_row_norms(weight, a, b, 0.7).double(), expected, atol=1e-5, rtol=1e-6)
    assert (row_norms(weight) > 0).all()


def test_b_learns_faster_in_lora_plus() -> None:
    ratios = learning_rate_ratios(trained(), 16.0)
    assert set(ratios.values()) == {16.0}
    assert all(name.endswith("lora_B") for name in ratios)
    assert len(ratios) == 4 * DENSE.num_hidden_layers


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraConfig(targets=("q_prj",)), "unknown lora target `q_prj`: did you mean `q_proj`"),
        (LoraConfig(targets=("gate",)), "unknown lora target `gate`"),  # the router computes in float32, by itself
        (LoraConfig(targets=()), "targets is empty"),
        (LoraConfig(r=0), "r is 0"),
        (LoraConfig(alpha=0.0), "alpha is 0"),
        (LoraConfig(init="svd"), "init is 'svd'"),
        (LoraConfig(use_dora=True, init="pissa"), "do not go together"),
        (LoraConfig(use_dora=True, targets=EXPERTS), "use_dora does not reach the stacked experts"),
        (LoraConfig(r=3, targets=EXPERTS), "multiple of 4"),
    ],
)
def test_bad_settings(lora: LoraConfig, message: str) -> None:
    model = Decoder(MOE).init_weights(0)
    with pytest.raises(UserError, match=message):
        attach(model, lora, seed=0)


def test_dense_layers_of_a_mixture_have_no_name_in_peft(tmp_path: Path) -> None:
    model = trained(MOE, LoraConfig(r=4, targets=("down_proj",)))
    with pytest.raises(UserError, match=r"peft takes layers\.1\.mlp\.down_proj for experts"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set"),
        ({"target_modules": "all-linear"}, "list target_modules"),
        ({"target_modules": ["q_proj"]}, "does not belong to this model"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"r": 2}, "has shape"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ],
)
def test_adapters_that_do_not_fit(changes: dict, message: str, tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)


def test_broken_adapter_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: missing"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)
    save_adapter(trained(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="only safetensors adapters are read"):
        load_adapter(Decoder(DENSE).init_weights(0), tmp_path)


def test_hybrids_take_adapters_too() -> None:
    model = trained(HYBRID, LoraConfig(r=4, targets=("q_proj", "g_proj", *EXPERTS)))
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
