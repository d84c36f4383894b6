"""Our policies, and transformers models with random weights."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from models.language.decoder import Decoder
from tests.models.language.policies import LLAMA3_ROPE, POLICIES, SHAPE


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(POLICIES[request.param]).init_weights(seed=0)


@pytest.fixture(params=["qwen3", "qwen3_moe", "mixtral", "dots1", "llama", "llama3_rope"])
def oracle(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A transformers model with random weights, norms included."""
    torch.manual_seed(0)
    if request.param == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True, attention_bias=True))
    elif request.param == "qwen3_moe":
        config = Qwen3MoeConfig(
            **SHAPE,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
        model = Qwen3MoeForCausalLM(config)
    elif request.param == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=6, num_experts_per_tok=2))
    elif request.param == "dots1":  # DeepSeek-V3's mixture
        config = Dots1Config(
            **SHAPE,
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            sliding_window=None,
            attention_bias=True,
        )
        model = Dots1ForCausalLM(config)
    else:
        rope = LLAMA3_ROPE if request.param == "llama3_rope" else {"rope_type": "default", "rope_theta": 1e4}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


@pytest.fixture
def oracle_folder(oracle: PreTrainedModel, tmp_path: Path) -> Path:
    oracle.save_pretrained(tmp_path / "oracle")
    return tmp_path / "oracle"
