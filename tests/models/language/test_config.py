"""Configurations: what they refuse, and what other software understands of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Dots1Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.errors import UserError
from models.language.config import LanguageConfig, RopeConfig
from models.language.rope import inverse_frequencies
from tests.models.language.policies import (
    DEEPSEEK,
    DENSE,
    GLM,
    HYBRID,
    LLAMA3_ROPE,
    MOE,
    POLICIES,
    RECURRENT,
    SHAPE,
    SPARSE,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads.*choose one of 1, 2, 4"),
        ({"head_dim": 15}, "head_dim is 15.*even"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9.*num_experts \(6\)"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"num_experts": 0, "shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size needs"),
        ({"layer_types": ("full_attention",)}, "layer_types names 1 layers"),
        ({"layer_types": ("full_attention", "mamba", "full_attention")}, "unknown kind 'mamba'.*linear_attention"),
        (
            {"layer_types": ("full_attention",) * 2 + ("linformer_attention",)},
            "linformer_attention.*layer 2.*later tokens",
        ),
        ({"layer_types": ("nystromformer_attention",) * 3}, "nystromformer_attention.*layer 0.*elu_attention"),
        ({"sparse_summary": 65}, r"sparse_summary is 65.*sparse_stride \(64\)"),
        ({"sparse_summary": 0}, "sparse_summary is 0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"gau_chunk_size": 0}, "gau_chunk_size is 0"),
        ({"performer_features": 0}, "performer_features is 0"),
        ({"mlp_only_layers": (3,)}, "mlp_only_layers names layer 3"),
        ({"scoring_func": "sigmoind"}, "unknown scoring_func `sigmoind`: did you mean `sigmoid`"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0"),
        ({"n_group": 4}, r"n_group \(4\) does not divide num_experts \(6\); choose one of 1, 2, 3, 6"),
        ({"n_group": 0}, "n_group is 0"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group is 3; there are only n_group \(2\)"),
        (
            {"n_group": 3, "num_experts_per_tok": 3},
            r"topk_group \(1\) groups of 2 hold fewer experts; raise topk_group",
        ),
        ({"n_group": 6, "topk_group": 6, "router_selection_bias": True}, "groups of one expert"),
        ({"expert_capacity_factor": 0.0}, "expert_capacity_factor is 0.0.*positive"),
        ({"rope": RopeConfig(rope_type="yarn")}, "rope_type 'yarn'"),
        ({"rope": RopeConfig(partial_rotary_factor=0.2)}, "partial_rotary_factor 0.2 turns 3.2 of head_dim 16"),
        ({"rope": RopeConfig(partial_rotary_factor=0.0)}, "partial_rotary_factor 0.0"),
        ({"rope": RopeConfig(rope_theta=0.0)}, "rope_theta is 0"),
        ({"eos_token_id": (97,)}, "eos_token_id 97 is outside the vocabulary of 97"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"norm_placement": "pree"}, "unknown norm_placement `pree`: did you mean `pre`"),
        ({"norm_type": "batch"}, "unknown norm_type `batch`"),
        ({"initializer": "xavir"}, "unknown initializer `xavir`: did you mean `xavier`"),
        ({"parametrization": "muP"}, "unknown parametrization `muP`: did you mean `mup`"),
        ({"attention_scaling": "root"}, "unknown attention_scaling `root`"),
        ({"log_n_from": 1}, "log_n_from is 1"),
        ({"initializer": "fixup"}, "initializer 'fixup' is for layers without norms"),
        ({"base_hidden_size": 0}, "base_hidden_size is 0"),
    ],
)
def test_a_bad_config_names_the_field_and_the_mend(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(MOE, **changes).validate()


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (DENSE, "qwen3"),
        (MOE, "qwen3_moe"),
        (HYBRID, "longstride"),
        (SPARSE, "longstride"),
        (RECURRENT, "longstride"),
        (replace(DENSE, qk_norm=False), "llama"),
        (replace(DENSE, qk_norm=False, num_attention_heads=6), "longstride"),  # transformers wants hidden % heads == 0
        (replace(MOE, qk_norm=False), "mixtral"),
        (replace(MOE, qk_norm=False, attention_bias=True), "longstride"),
        (replace(MOE, qk_norm=False, mlp_only_layers=(0,)), "longstride"),
        (replace(MOE, scoring_func="sigmoid"), "longstride"),
        (replace(MOE, expert_capacity_factor=1.25), "longstride"),
        (replace(MOE, n_group=2), "longstride"),
        (DEEPSEEK, "dots1"),
        (GLM, "glm4_moe"),
        (replace(GLM, qk_norm=False), "glm4_moe"),
        (replace(GLM, o_proj_bias=True), "longstride"),
        (replace(MOE, rope=RopeConfig(partial_rotary_factor=0.5)), "longstride"),
        (replace(DEEPSEEK, shared_expert_gate=True), "longstride"),
        (replace(DEEPSEEK, mlp_only_layers=(1,)), "longstride"),
        (replace(DEEPSEEK, shared_expert_intermediate_size=40), "longstride"),  # not a number of experts
        (replace(MOE, mlp_only_layers=(0, 1, 2)), "qwen3"),
        (replace(MOE, shared_expert_intermediate_size=8), "longstride"),
        (replace(DENSE, norm_placement="post"), "longstride"),
        (replace(DENSE, norm_type="layer_norm"), "longstride"),
        (replace(DENSE, attention_scaling="none"), "longstride"),
        (replace(DENSE, log_n_from=64), "longstride"),
        (replace(DENSE, parametrization="mup"), "longstride"),
        (replace(DENSE, initializer="xavier"), "qwen3"),  # leaves no trace
    ],
)
def test_model_type_is_the_plainest_that_holds_the_model(config: LanguageConfig, model_type: str) -> None:
    assert config.to_hf()["model_type"] == model_type


@pytest.mark.parametrize("name", POLICIES)
def test_round_trip(name: str) -> None:
    config = replace(POLICIES[name], eos_token_id=(3, 4), bos_token_id=1, rope=RopeConfig(**LLAMA3_ROPE))
    again = LanguageConfig.from_hf(config.to_hf())
    assert again.to_hf() == config.to_hf()
    assert again.eos_token_id == (3, 4)
    assert again.rope == config.rope


DOTS1 = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "sliding_window": None}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Qwen3Config, {}),
        (Qwen3MoeConfig, {}),
        (LlamaConfig, {}),
        (MixtralConfig, {}),
        (Dots1Config, DOTS1),
        (Glm4MoeConfig, {"num_mtp_layers": 0}),
    ],
)
def test_defaults_of_transformers_are_ours(kind: type, fields: dict) -> None:
    given = kind(**SHAPE, **fields).to_dict()
    theirs = kind(**LanguageConfig.from_hf(given).to_hf()).to_dict()
    for name, value in given.items():
        if name not in ("architectures", "dtype", "layer_types", "transformers_version", "num_experts"):
            assert theirs[name] == value, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (DeepseekV3Config().to_dict(), "'deepseek_v3' has multi-head latent attention.*such as glm4_moe"),
        (MixtralConfig(**SHAPE, sliding_window=64).to_dict(), "sliding_window is 64; Mixtral is supported without"),
        (Dots1Config(**SHAPE, **DOTS1 | {"sliding_window": 64, "max_window_layers": 1}).to_dict(), "sliding_window"),
        (MixtralConfig(**SHAPE).to_dict() | {"num_local_experts": None}, "the field num_local_experts is missing"),
        (Dots1Config(**SHAPE, **DOTS1 | {"num_experts_per_tok": 9}).to_dict(), "num_experts_per_tok is 9"),
        (Dots1Config(**SHAPE, **DOTS1 | {"n_group": 3}).to_dict(), "n_group .3. does not divide"),
        (Glm4MoeConfig(**SHAPE).to_dict() | {"norm_topk_prob": None}, "the field norm_topk_prob is missing"),
        (HYBRID.to_hf() | {"scoring_func": 1}, "scoring_func is 1; it must be a string"),
        (HYBRID.to_hf() | {"expert_capacity_factor": "much"}, "expert_capacity_factor is 'much'; it must be a number"),
    ],
)
def test_folders_that_cannot_be_run(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LanguageConfig.from_hf(fields)


def test_transformers_meets_only_layer_types_that_it_knows(tmp_path: Path) -> None:
    """AutoTokenizer, for one, reads config.json without knowing our model type."""
    for config in (SPARSE, RECURRENT, HYBRID):
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
        assert PreTrainedConfig.from_pretrained(tmp_path).num_hidden_layers == config.num_hidden_layers
    assert SPARSE.to_hf()["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert set(RECURRENT.to_hf()["layer_types"]) == {"linear_attention"}
    assert LanguageConfig.from_hf(RECURRENT.to_hf()).layer_types == RECURRENT.layer_types
    assert "mixer_kinds" not in HYBRID.to_hf()


def test_configs_of_transformers_4() -> None:
    """rope_theta and rope_scaling side by side, head_dim left out."""
    old = {"model_type": "llama", **SHAPE, "rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}}
    del old["head_dim"], old["rope_scaling"]["rope_theta"]
    config = LanguageConfig.from_hf(old)
    assert config.rope == RopeConfig(**LLAMA3_ROPE)
    assert config.head_dim == 16
    assert not config.qk_norm
    with pytest.raises(UserError, match="lack factor"):
        LanguageConfig.from_hf(
            old | {"rope_scaling": {k: 1 for k in LLAMA3_ROPE if k != "factor"} | {"type": "llama3"}}
        )


def test_llama3_frequencies_equal_those_of_transformers() -> None:
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SHAPE | {"head_dim": 64}, rope_parameters=LLAMA3_ROPE))
    ours = inverse_frequencies(RopeConfig(**LLAMA3_ROPE), 64)
    plain = inverse_frequencies(RopeConfig(rope_theta=5e5), 64)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    changed = ~torch.isclose(ours, plain)
    assert changed.any()
    assert not changed.all()
