"""Small policies of every family, with logits far from uniform."""

from dataclasses import replace

import torch

from models.language.config import LanguageConfig, RopeConfig
from models.language.decoder import Decoder

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DENSE = LanguageConfig(**SHAPE, tie_word_embeddings=False)
MOE = replace(DENSE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)
HYBRID = replace(
    MOE,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
    shared_expert_intermediate_size=32,
    mlp_only_layers=(1,),
    tie_word_embeddings=True,
)
DEEPSEEK = (
    replace(  # DeepSeek-V3's mixture: sigmoid scores, groups, a selection bias, a shared expert, dense layers first
        MOE,
        num_experts=8,
        num_experts_per_tok=3,
        scoring_func="sigmoid",
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        router_selection_bias=True,
        shared_expert_intermediate_size=64,
        shared_expert_gate=False,
        mlp_only_layers=(0,),
    )
)
SPARSE = replace(
    MOE,
    layer_types=("sliding_attention", "strided_attention", "fixed_attention"),
    sliding_window=24,
    sparse_stride=8,
    sparse_summary=2,
)
RECURRENT_KINDS = (
    "linear_attention", "gated_delta_rule", "elu_attention", "efficient_attention", "performer_attention",
    "gated_attention_unit",
)  # fmt: skip
RECURRENT = replace(
    MOE,
    num_hidden_layers=6,
    layer_types=RECURRENT_KINDS,
    performer_features=24,
    gau_chunk_size=16,
    initializer_range=0.12,  # six layers at 0.2 make float32 rounding alone reach 2e-5
)
GLM = replace(DEEPSEEK, attention_bias=True, o_proj_bias=False, rope=RopeConfig(partial_rotary_factor=0.5))
POST_NORM = replace(
    DENSE, norm_placement="post", norm_type="layer_norm", parametrization="mup", base_hidden_size=32, log_n_from=8
)
# As transformers' families cannot: every one of them is pre-norm.
DEEPNORM = replace(HYBRID, norm_placement="deepnorm", initializer="deepnorm", attention_scaling="inverse")
GATES = replace(MOE, norm_placement="none", initializer_range=0.23)  # at 0.3 it explodes
POLICIES = {
    "dense": DENSE,
    "moe": MOE,
    "hybrid": HYBRID,
    "deepseek": DEEPSEEK,
    "sparse": SPARSE,
    "recurrent": RECURRENT,
    "post-norm": POST_NORM,
    "deepnorm": DEEPNORM,
    "gates": GATES,
}


def made(config: LanguageConfig, seed: int = 0) -> Decoder:
    """A model with random weights, its gates open: at 0, where they begin, the layers would do nothing."""
    model = Decoder(config).init_weights(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("residual.gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model
