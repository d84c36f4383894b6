"""The decoder inside vLLM: vLLM's projections, paged attention and fused experts; our norms and recurrent mixers."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping

try:
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory as FusedMoE  # 0.27
except ImportError:
    from vllm.model_executor.layers.fused_moe import FusedMoE  # 0.24
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sequence import IntermediateTensors

from llm_rl.vllm_engine.config import language_config
from llm_rl.vllm_engine.recurrent_layer import RecurrentLayer, state_shape
from llm_rl.vllm_engine.sparse_layer import SparseAttention
from models.errors import UserError
from models.language.config import LanguageConfig
from models.language.mixers import MIXERS
from models.language.norm import Residual, RMSNorm, final_norm, layer_norm
from models.language.parametrisation import head_multiplier
from models.language.query_scale import QueryScale
from models.language.recurrent import RecurrentMixer


class SoftmaxAttentionLayer(nn.Module):
    """vLLM's own attention for full and sliding windows, ours for the patterns that it does not have."""

    def __init__(self, config: LanguageConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        kind = config.mixer_kind(layer)
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim = size
        self.sizes = [heads * size, kv_heads * size, kv_heads * size]
        self.qkv_proj = QKVParallelLinear(hidden, size, heads, kv_heads, bias=bias, prefix=f"{prefix}.qkv_proj")
        o_bias = bias and config.o_proj_bias
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=o_bias, prefix=f"{prefix}.o_proj")
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.query_scale = QueryScale(config, reads_all=kind == "full_attention")
        self.rotary = get_rope(
            size, max_position=config.max_position_embeddings, rope_parameters=config.to_hf()["rope_parameters"]
        )
        self.attn: nn.Module
        if kind in ("strided_attention", "fixed_attention"):
            self.attn = SparseAttention(config, layer, vllm_config, f"{prefix}.attn")
        else:
            self.attn = Attention(
                heads,
                size,
                size**-0.5,
                num_kv_heads=kv_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=config.sliding_window if kind == "sliding_attention" else None,
                prefix=f"{prefix}.attn",
            )

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split(self.sizes, -1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary(positions, q, k)
        q = self.query_scale(q.unflatten(-1, (-1, self.head_dim)), positions).flatten(-2)
        y_TD, _ = self.o_proj(self.attn(q, k, v))
        return y_TD


class DenseMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias=False, prefix=f"{prefix}.down_proj")
        self.activation = SiluAndMul()

    def forward(self, x_TD: Tensor) -> Tensor:
        both, _ = self.gate_up_proj(x_TD)
        y_TD, _ = self.down_proj(self.activation(both))
        return y_TD


class MixtureOfExperts(nn.Module):
    def __init__(self, config: LanguageConfig, prefix: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        # The router works in float32, as the learner's does, whatever the model's dtype.
        self.gate = ReplicatedLinear(
            hidden, config.num_experts, bias=False, params_dtype=torch.float32, prefix=f"{prefix}.gate"
        )
        bias = None
        if config.router_selection_bias:
            bias = nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32), requires_grad=False)
            self.gate.e_score_correction_bias = bias
        # vLLM's grouped router also knows sigmoid scores, the bias and the scaling, on every device; one group will do.
        grouped = config.scoring_func != "softmax" or bias is not None or config.routed_scaling_factor != 1
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=hidden,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            scoring_func=config.scoring_func,
            use_grouped_topk=grouped or config.n_group > 1,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
            e_score_correction_bias=bias,
            prefix=f"{prefix}.experts",
        )
        self.shared_expert: DenseMLP | None = None
        self.shared_expert_gate: ReplicatedLinear | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = DenseMLP(hidden, config.shared_expert_intermediate_size, f"{prefix}.shared_expert")
            if config.shared_expert_gate:
                self.shared_expert_gate = ReplicatedLinear(hidden, 1, bias=False, prefix=f"{prefix}.shared_expert_gate")

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE, _ = self.gate(x_TD.float())
        shared_TD: Tensor | float = 0.0
        if self.shared_expert is not None:  # before the experts, which may reuse x as their workspace
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                gate, _ = self.shared_expert_gate(x_TD)
                shared_TD = gate.sigmoid() * shared_TD
        return self.experts(hidden_states=x_TD, router_logits=logits_TE) + shared_TD


class Layer(nn.Module):
    def __init__(self, config: LanguageConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.is_recurrent = issubclass(MIXERS[config.mixer_kind(layer)], RecurrentMixer)
        mixer = RecurrentLayer if self.is_recurrent else SoftmaxAttentionLayer
        self.input_layernorm = layer_norm(config)
        self.attention_residual = Residual(config)
        self.self_attn = mixer(config, layer, vllm_config, f"{prefix}.self_attn")
        self.has_mlp = config.has_mlp(layer)
        if not self.has_mlp:
            return
        self.post_attention_layernorm = layer_norm(config)
        self.mlp_residual = Residual(config)
        if config.is_moe(layer):
            self.mlp: nn.Module = MixtureOfExperts(config, f"{prefix}.mlp")
        else:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        y_TD = self.self_attn(positions, self.attention_residual.read(x_TD, self.input_layernorm))
        x_TD = self.attention_residual.add(x_TD, y_TD, self.input_layernorm)
        if not self.has_mlp:
            return x_TD
        y_TD = self.mlp(self.mlp_residual.read(x_TD, self.post_attention_layernorm))
        return self.mlp_residual.add(x_TD, y_TD, self.post_attention_layernorm)


class Body(nn.Module):
    def __init__(self, config: LanguageConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            [Layer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = final_norm(config)
        self.head_multiplier = head_multiplier(config)

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = layer(positions, x_TD)
        x_TD = self.norm(x_TD)
        return x_TD if self.head_multiplier == 1.0 else x_TD * self.head_multiplier


class LongstrideForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA):
    """What vLLM builds for a folder of ours, and for the families that plugin.SERVED_HERE names."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {  # merged parameter: its parts in a checkpoint
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise UserError("longstride models run on one GPU in vLLM; set tensor_parallel_size to 1")
        self.config = vllm_config.model_config.hf_config
        language = language_config(self.config)
        self.num_experts = language.num_experts
        self.model = Body(language, vllm_config, f"{prefix}.model" if prefix else "model")
        if language.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(language.vocab_size, language.hidden_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(language.vocab_size)
        # Of an adapter's tensors, whose names are the learner's: a recurrent layer holds its mixer whole.
        attention = [f"model.layers.{i}.self_attn." for i, layer in enumerate(self.model.layers) if layer.is_recurrent]
        self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={name: f"{name}mixer." for name in attention})

    def get_expert_mapping(self) -> list[tuple[str, str, int, str]]:
        """(merged parameter, part of a checkpoint, expert, shard) of each expert's matrices."""
        return fused_moe_make_expert_params_mapping(self, "gate_proj", "down_proj", "up_proj", self.num_experts)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shape(language_config(vllm_config.model_config.hf_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> object:
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(positions, inputs_embeds)

    def compute_logits(self, hidden_TD: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_TD)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights under their checkpoint names; the names of the parameters they went to."""
        parameters = dict(self.named_parameters())
        experts = self.get_expert_mapping() if self.num_experts else []
        loaded = set()
        for name, tensor in weights:
            name = name.replace(".shared_experts.", ".shared_expert.")  # of dots1
            if name == "lm_head.weight" and self.lm_head is self.model.embed_tokens:
                continue
            target, arguments = self._place(name, parameters, experts)
            loader = getattr(parameters[target], "weight_loader", default_weight_loader)
            loader(parameters[target], tensor, **arguments)
            loaded.add(target)
        return loaded

    def _place(
        self, name: str, parameters: dict[str, nn.Parameter], experts: list[tuple[str, str, int, str]]
    ) -> tuple[str, dict]:
        """The parameter that holds a checkpoint tensor, and the arguments of its loader that say where."""
        if ".mlp.experts." in name:
            for merged, part, expert, shard in experts:
                if part in name:
                    target = name.replace(part, merged)
                    return target, {"weight_name": target, "shard_id": shard, "expert_id": expert}
        for merged, parts in self.packed_modules_mapping.items():
            for index, part in enumerate(parts):
                target = name.replace(f".{part}.", f".{merged}.")
                if target != name and target in parameters:
                    return target, {"loaded_shard_id": "qkv"[index] if merged == "qkv_proj" else index}
        if name not in parameters:  # a recurrent layer holds the learner's mixer whole
            name = name.replace(".self_attn.", ".self_attn.mixer.")
        if name not in parameters:
            raise UserError(f"unexpected tensor {name}; does config.json describe this model?")
        return name, {}
