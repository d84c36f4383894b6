"""transformers models with random weights, one for each family that we read."""

import torch
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
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

from tests.models.language.policies import LLAMA3_ROPE, SHAPE

DOTS1 = {  # DeepSeek-V3's mixture
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "sliding_window": None, "attention_bias": True,
}  # fmt: skip
GLM = {  # the same, with half of each head turned by its position
    **{name: value for name, value in DOTS1.items() if name != "sliding_window"},
    "use_qk_norm": True, "num_mtp_layers": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
QWEN3_MOE = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
ORACLES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True, attention_bias=True)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **QWEN3_MOE)),
    # Without QK-norm large weights make attention so sharp that float32 rounding alone reaches 1e-5.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SHAPE | {"initializer_range": 0.15}, num_local_experts=6, num_experts_per_tok=2)
    ),
    "dots1": lambda: Dots1ForCausalLM(Dots1Config(**SHAPE, **DOTS1)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**SHAPE, **GLM)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ),
    "llama3_rope": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE)),
}


@torch.no_grad()
def oracle_model(family: str) -> PreTrainedModel:
    """Random weights, norms, biases and selection biases included."""
    torch.manual_seed(0)
    model = ORACLES[family]()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model
