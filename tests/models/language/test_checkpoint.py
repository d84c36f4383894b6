"""Model folders: transformers is the oracle in both directions; broken folders give one clear line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from models.errors import UserError
from models.language import checkpoint
from models.language.checkpoint import load_checkpoint_tensors, load_pretrained, save_pretrained, to_checkpoint
from models.language.decoder import Decoder
from models.language.packing import Packing
from tests.models.language.policies import DEEPSEEK, GLM, HYBRID, MOE, SHAPE

LENGTHS = (40, 7, 23)


def pack() -> tuple[torch.Tensor, Packing]:
    return torch.randint(0, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)), Packing.of(LENGTHS)


def alone(model: PreTrainedModel, tokens_T: torch.Tensor) -> torch.Tensor:
    """transformers' logits of each sequence by itself, one after another."""
    return torch.cat([model(tokens[None]).logits[0] for tokens in tokens_T.split(LENGTHS)])


def test_logits_and_gradients_equal_those_of_transformers(oracle: PreTrainedModel, oracle_folder: Path) -> None:
    model = load_pretrained(oracle_folder)
    tokens_T, packing = pack()
    ours, theirs = model.logits(model(tokens_T, packing)), alone(oracle, tokens_T)
    assert theirs.std() > 1  # a comparison of near-zero logits would show nothing
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / len(tokens_T)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    gradients = {n if n.startswith("lm_head") else f"model.{n}": p.grad for n, p in model.named_parameters()}
    compared = 0
    for name, parameter in oracle.named_parameters():
        name = name.replace(".shared_experts.", ".shared_expert.")  # dots1's name of it
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared == len(gradients)


def test_transformers_loads_what_we_save(oracle: PreTrainedModel, oracle_folder: Path, tmp_path: Path) -> None:
    model = load_pretrained(oracle_folder)
    save_pretrained(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(oracle)
    tokens_T, packing = pack()
    with torch.no_grad():
        torch.testing.assert_close(alone(again, tokens_T), alone(oracle, tokens_T), atol=1e-6, rtol=0)
        torch.testing.assert_close(model.logits(model(tokens_T, packing)), alone(again, tokens_T), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("written_by", ["transformers 5", "transformers 4"])
def test_a_qwen3_folder_with_a_sliding_window(written_by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    window = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}
    oracle = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **window))
    oracle.save_pretrained(tmp_path)
    if written_by == "transformers 4":
        config = json.loads((tmp_path / "config.json").read_text())
        del config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path)
    assert model.config.layer_types == ("full_attention", "sliding_attention", "sliding_attention")
    tokens_T, packing = pack()
    theirs = alone(oracle, tokens_T)
    torch.testing.assert_close(model.logits(model(tokens_T, packing)), theirs, atol=1e-5, rtol=0)
    whole = Decoder(replace(model.config, layer_types=()))
    whole.load_state_dict(model.state_dict())
    assert (whole.logits(whole(tokens_T, packing)) - theirs).abs().max() > 0.1  # the window matters


def test_every_kind_of_model_survives_a_round_trip(policy: Decoder, tmp_path: Path) -> None:
    for bias in policy.buffers():
        bias.normal_()
    save_pretrained(policy, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config.to_hf() == policy.config.to_hf()
    for (name, before), (same_name, after) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert name == same_name
        assert torch.equal(before, after)
    for before, after in zip(policy.buffers(), again.buffers(), strict=True):
        assert torch.equal(before, after)


def test_a_model_with_new_layer_kinds_has_our_model_type(tmp_path: Path) -> None:
    save_pretrained(Decoder(HYBRID).init_weights(0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "longstride"
    assert config["architectures"] == ["LongstrideForCausalLM"]


@pytest.mark.parametrize("changes", [{"expert_capacity_factor": 1.5}, {"shared_expert_gate": True}, {"n_group": 2}])
def test_our_model_type_keeps_every_field_of_the_mixture(changes: dict, tmp_path: Path) -> None:
    config = replace(DEEPSEEK, mlp_only_layers=(1,), **changes)
    model = Decoder(config).init_weights(0)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longstride"
    again = load_pretrained(tmp_path)
    assert replace(again.config, layer_types=()) == config
    assert again.state_dict().keys() == model.state_dict().keys()


def test_layers_for_speculative_decoding_are_left_out(tmp_path: Path) -> None:
    model = Decoder(GLM).init_weights(0)
    save_pretrained(model, tmp_path)
    _edit_tensors(lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2)}))(tmp_path)
    assert torch.equal(load_pretrained(tmp_path).norm.weight, model.norm.weight)
    save_pretrained(Decoder(DEEPSEEK).init_weights(0), tmp_path)
    _edit_tensors(lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2)}))(tmp_path)
    with pytest.raises(UserError, match="unexpected tensor"):
        load_pretrained(tmp_path)


def test_sharded_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    model = Decoder(MOE).init_weights(0)
    save_pretrained(model, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens_T, packing = pack()
    with torch.no_grad():
        expected = model.logits(model(tokens_T, packing))
        ours = load_pretrained(tmp_path)
        assert torch.equal(ours.logits(ours(tokens_T, packing)), expected)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(alone(theirs, tokens_T), expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10**9)
    other = Decoder(MOE).init_weights(1)
    save_pretrained(other, tmp_path)  # over the shards: their index must not win
    assert torch.equal(load_pretrained(tmp_path).embed_tokens.weight, other.embed_tokens.weight)


def test_tokenizer_files_travel_along(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_text("not wanted")
    save_pretrained(Decoder(MOE).init_weights(0), tmp_path / "saved", tokenizer_files_from=tmp_path / "base")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    save_pretrained(Decoder(MOE).init_weights(0).to(torch.bfloat16), tmp_path)
    assert load_pretrained(tmp_path, torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value != "DROP"}))

    return edit


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lost_shard(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_outside(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "only pickled": (_only_bin, "pickled"),
    "truncated": (_truncate, "not a whole safetensors file"),
    "lost shard": (_lost_shard, "model-00002-of-00002.safetensors: missing"),
    "shard outside": (_shard_outside, "outside the folder"),
    "missing tensor": (_edit_tensors(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
    "unexpected": (_edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "unexpected tensor extra"),
    "wrong shape": (_edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3)})), "shape [3]"),
    "model type": (_edit_config(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "rope": (_edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type 'yarn'"),
    "sliding window": (_edit_config(use_sliding_window=True), "use_sliding_window"),
    "quantised": (_edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "no hidden size": (_edit_config(hidden_size="DROP"), "hidden_size is missing"),
    "wrong type": (_edit_config(hidden_size="64"), "hidden_size"),
    "top-k": (_edit_config(num_experts_per_tok=7), "num_experts_per_tok is 7"),
    "heads": (_edit_config(num_key_value_heads=3), "choose one of 1, 2, 4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_gives_one_clear_line(case: str, tmp_path: Path) -> None:
    save_pretrained(Decoder(MOE).init_weights(0), tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value) or "model config" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        load_pretrained(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model"):
        save_pretrained(Decoder(MOE).init_weights(0), tmp_path / "file")


def test_live_weights_are_checked_too() -> None:
    model = Decoder(MOE).init_weights(0)
    named = dict(to_checkpoint(Decoder(MOE).init_weights(1)))
    load_checkpoint_tensors(model, named.items())
    assert torch.equal(model.layers[0].mlp.experts.down_proj[3], named["model.layers.0.mlp.experts.3.down_proj.weight"])
    named.pop("model.layers.2.mlp.experts.5.up_proj.weight")
    with pytest.raises(UserError, match=r"experts\.5\.up_proj\.weight is missing"):
        load_checkpoint_tensors(model, named.items())
