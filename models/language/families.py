"""The families of Hugging Face folders that can hold one of our models, and how their names differ from ours.

Our own names are those of Qwen3-MoE where it has one, so a family lists only its differences. A new family is an entry
in FAMILIES.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.errors import UserError

if TYPE_CHECKING:
    from models.language.config import LanguageConfig

Fields = dict[str, Any]

# The router of Mixtral and Qwen3-MoE, and nothing beside the routed experts.
PLAIN_ROUTER: Fields = {
    "scoring_func": "softmax", "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "router_selection_bias": False, "shared_expert_intermediate_size": 0, "shared_expert_gate": True,
    "expert_capacity_factor": None,
}  # fmt: skip
# That of DeepSeek-V3, whose shared expert has no gate.
DEEPSEEK_ROUTER: Fields = {
    "scoring_func": "sigmoid", "router_selection_bias": True, "shared_expert_gate": False, "decoder_sparse_step": 1,
    "expert_capacity_factor": None,
}  # fmt: skip
EXPERTS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef"}
SPARSITY: Fields = {"mlp_only_layers": (), "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Family:
    """One model type. `fixed` fields have that value in every folder of the family and are not written."""

    architecture: str
    fixed: Fields = field(default_factory=dict)
    unwritten: frozenset[str] = frozenset()  # fields without meaning here
    holds: Callable[["LanguageConfig"], bool] = lambda config: True  # beside the fixed fields
    required: tuple[str, ...] = ()  # what the folder's config.json must have, in its names
    read: Callable[[Mapping[str, Any], str], Fields] = lambda config, source: {}  # fields that it names otherwise
    write: Callable[[Fields], Fields] = lambda values: values  # and back
    tensors: tuple[tuple[str, str], ...] = ()  # our part of a tensor's name, the folder's part
    as_llama: bool = True  # attention turns whole heads, and attention_bias reaches o_proj too
    next_token_layers: bool = False  # the folder may end with layers for speculative decoding, which are left out

    def contains(self, config: "LanguageConfig") -> bool:
        if self.as_llama and (config.rope.partial_rotary_factor != 1.0 or not config.o_proj_bias):
            return False
        return all(getattr(config, name) == value for name, value in self.fixed.items()) and self.holds(config)

    def tensor_name(self, name: str) -> str:
        """The folder's name of one of our tensors."""
        for ours, theirs in self.tensors:
            name = name.replace(ours, theirs)
        return name


def family_of(config: "LanguageConfig") -> str:
    """The plainest model type that holds the model, from its mixture of experts and head norms."""
    return next(name for name, family in FAMILIES.items() if family.contains(config))


def require_known(model_type: object, source: str) -> None:
    """Raises UserError for a model type that we cannot run."""
    if model_type in MLA_TYPES:
        raise UserError(
            f"{source}: model_type {model_type!r} has multi-head latent attention (MLA), which is not supported; its "
            "mixture of experts is: use a checkpoint with grouped-query attention, such as glm4_moe or qwen3_moe"
        )
    if model_type not in FAMILIES:
        raise UserError(f"{source}: model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")


def _is_dense(config: "LanguageConfig") -> bool:
    return not any(config.is_moe(layer) for layer in range(config.num_hidden_layers))


def _splits_hidden(config: "LanguageConfig") -> bool:
    """transformers' Llama insists on it."""
    return _is_dense(config) and config.hidden_size % config.num_attention_heads == 0


def _read_dense(config: Mapping[str, Any], source: str) -> Fields:
    return {"num_experts": 0}


def _read_qwen3_moe(config: Mapping[str, Any], source: str) -> Fields:
    # transformers writes the class attribute's other name for the same field
    return {
        "num_experts": config.get("num_experts", config.get("num_local_experts", 128)),
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
    }


def _read_mixtral(config: Mapping[str, Any], source: str) -> Fields:
    if config.get("sliding_window"):
        raise UserError(f"{source}: sliding_window is {config['sliding_window']}; Mixtral is supported without one")
    return {
        "num_experts": config["num_local_experts"],
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }


def _write_mixtral(values: Fields) -> Fields:
    values = dict(values, num_local_experts=values["num_experts"], intermediate_size=values["moe_intermediate_size"])
    return {name: value for name, value in values.items() if name not in ("num_experts", "moe_intermediate_size")}


def _read_dots1(config: Mapping[str, Any], source: str) -> Fields:
    if config.get("sliding_window") and config.get("max_window_layers", 62) < config["num_hidden_layers"]:
        raise UserError(f"{source}: sliding_window is {config['sliding_window']}; dots1 is supported without one")
    return _read_deepseek(config)


def _read_glm4_moe(config: Mapping[str, Any], source: str) -> Fields:
    return _read_deepseek(config) | {"qk_norm": bool(config.get("use_qk_norm"))}


def _read_deepseek(config: Mapping[str, Any]) -> Fields:
    return {
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
        "mlp_only_layers": tuple(range(config.get("first_k_dense_replace") or 0)),
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
    }


def _write_dots1(values: Fields) -> Fields:
    return _write_deepseek(values) | {"sliding_window": None}


def _write_glm4_moe(values: Fields) -> Fields:
    values = _write_deepseek(values) | {"use_qk_norm": values["qk_norm"], "num_nextn_predict_layers": 0}
    return {name: value for name, value in values.items() if name not in ("qk_norm", "layer_types")}


def _write_deepseek(values: Fields) -> Fields:
    values = dict(
        values,
        n_routed_experts=values["num_experts"],
        n_shared_experts=values["shared_expert_intermediate_size"] // values["moe_intermediate_size"],
        first_k_dense_replace=len(values["mlp_only_layers"]),
    )
    return {name: value for name, value in values.items() if name not in _DEEPSEEK_OTHERWISE}


def _is_deepseek(config: "LanguageConfig") -> bool:
    shared = config.shared_expert_intermediate_size
    dense_first = config.mlp_only_layers == tuple(range(len(config.mlp_only_layers)))
    return config.num_experts > 0 and shared > 0 and shared % config.moe_intermediate_size == 0 and dense_first


_DEEPSEEK_OTHERWISE = {"num_experts", "shared_expert_intermediate_size", "mlp_only_layers", "router_aux_loss_coef"}
_DENSE_UNWRITTEN = frozenset({*EXPERTS, *SPARSITY, *PLAIN_ROUTER})

# The plainest first. Each is complete: what none of the others holds is "longstride".
FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": True}, unwritten=_DENSE_UNWRITTEN, holds=_is_dense, read=_read_dense
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {"qk_norm": False},
        unwritten=_DENSE_UNWRITTEN | {"layer_types"},
        holds=_splits_hidden,
        read=_read_dense,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        PLAIN_ROUTER | {"qk_norm": True},
        unwritten=frozenset({"layer_types"}),
        required=("num_experts_per_tok", "moe_intermediate_size"),
        read=_read_qwen3_moe,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        PLAIN_ROUTER | SPARSITY | {"qk_norm": False, "attention_bias": False, "norm_topk_prob": True},
        unwritten=frozenset({"layer_types"}),
        holds=lambda config: config.num_experts > 0,
        required=("num_experts_per_tok", "num_local_experts"),
        read=_read_mixtral,
        write=_write_mixtral,
        tensors=(
            (".mlp.", ".block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".up_proj.", ".w3."),
            (".down_proj.", ".w2."),
        ),
    ),
    "dots1": Family(
        "Dots1ForCausalLM",
        DEEPSEEK_ROUTER | {"qk_norm": True},
        holds=_is_deepseek,
        required=("num_experts_per_tok", "moe_intermediate_size", "n_routed_experts"),
        read=_read_dots1,
        write=_write_dots1,
        tensors=((".shared_expert.", ".shared_experts."),),
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        DEEPSEEK_ROUTER | {"o_proj_bias": False},
        holds=_is_deepseek,
        required=(
            "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
            "first_k_dense_replace", "norm_topk_prob",
        ),
        read=_read_glm4_moe,
        write=_write_glm4_moe,
        tensors=((".shared_expert.", ".shared_experts."),),
        as_llama=False,
        next_token_layers=True,
    ),
    "longstride": Family("LongstrideForCausalLM", as_llama=False),
}  # fmt: skip
MLA_TYPES = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "longcat_flash"}
