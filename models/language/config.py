"""The shape of a policy: a superset of the Qwen3, Qwen3-MoE, Llama, Mixtral, dots1 and GLM-4.5 configurations."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from models.errors import UserError, unknown_name
from models.language.families import FAMILIES, family_of, require_known

MIXER_KINDS = (
    "full_attention", "sliding_attention", "strided_attention", "fixed_attention",
    "linear_attention", "gated_delta_rule", "elu_attention", "efficient_attention", "performer_attention",
    "gated_attention_unit",
)  # fmt: skip
# transformers refuses names that it does not know, and vLLM counts layers by them. So `layer_types` of a config.json
# says what a layer keeps of the past (keys and values, a window of them, or a state), and `mixer_kinds` its kind.
STANDARD_KINDS = {kind: "linear_attention" for kind in MIXER_KINDS if not kind.startswith(("full", "sliding"))}
STANDARD_KINDS |= {"strided_attention": "full_attention", "fixed_attention": "full_attention"}
BIDIRECTIONAL_KINDS = ("linformer_attention", "nystromformer_attention")  # modules, but not for a causal policy

NORM_TYPES = ("rms_norm", "layer_norm")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "deepnorm", "none")
ATTENTION_SCALINGS = ("sqrt", "inverse", "none")
INITIALIZERS = ("truncated_normal", "xavier", "he", "lecun", "orthogonal", "t5", "deepnorm", "fixup")
PARAMETRIZATIONS = ("standard", "ntk", "mup")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The fields from `factor` on belong to rope_type "llama3"."""

    rope_type: str = "default"  # "default" or "llama3"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0  # share of a head's channels that turns (GLM-4.5: half of them)
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LanguageConfig:
    """Field names are those of the Hugging Face configurations. The defaults make a 1.3M-parameter dense decoder."""

    vocab_size: int = 512
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512  # of a dense MLP

    layer_types: tuple[str, ...] = ()  # sequence mixer of each layer, of MIXER_KINDS; empty: all full_attention
    qk_norm: bool = True  # RMSNorm on each head's query and key (Qwen3)
    attention_bias: bool = False  # bias on q, k, v and o of softmax attention, full or sparse
    o_proj_bias: bool = True  # with attention_bias: on o too (GLM-4.5 has none there)
    sliding_window: int = 256  # tokens that a token reads in sliding_attention, itself included
    sparse_stride: int = 64  # of strided_attention and fixed_attention
    sparse_summary: int = 8  # positions at the end of each stride that all later tokens read in fixed_attention
    performer_features: int = 64  # random features for each head of performer_attention
    gau_chunk_size: int = 256  # tokens that gated_attention_unit reads pair by pair

    num_experts: int = 0  # 0: every MLP is dense
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    norm_topk_prob: bool = True  # the chosen experts' weights sum to 1
    scoring_func: str = "softmax"  # of the router: "softmax" or "sigmoid"
    routed_scaling_factor: float = 1.0  # times the weights
    n_group: int = 1  # groups of experts; a token's experts come from its best topk_group groups
    topk_group: int = 1
    router_selection_bias: bool = False  # a bias for the choice alone, moved by the load (DeepSeek-V3)
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    shared_expert_gate: bool = True  # a sigmoid gate on the shared expert (Qwen2-MoE); DeepSeek-V3 has none
    expert_capacity_factor: float | None = None  # room in an expert, in fair shares, while training; None: no limit
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: tuple[int, ...] = ()  # layers with a dense MLP in a mixture-of-experts model
    decoder_sparse_step: int = 1  # layer i is a mixture if (i + 1) is a multiple of this

    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    norm_type: str = "rms_norm"  # of NORM_TYPES; head norms (qk_norm) are RMSNorm always
    norm_placement: str = "pre"  # of NORM_PLACEMENTS
    attention_scaling: str = (
        "sqrt"  # softmax attention divides q · k by: "sqrt" √head_dim, "inverse" head_dim, "none" 1
    )
    log_n_from: int = 0  # full_attention multiplies logits by max(1, log n / log this) at n tokens; 0: never

    initializer: str = "truncated_normal"  # of INITIALIZERS
    initializer_range: float = 0.02  # σ of "truncated_normal"
    parametrization: str = "standard"  # of PARAMETRIZATIONS: what follows the width, and how
    base_hidden_size: int = 128  # the width at which "mup" and "ntk" are "standard"

    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def mixer_kind(self, layer: int) -> str:
        return self.layer_types[layer] if self.layer_types else "full_attention"

    def has_mlp(self, layer: int) -> bool:
        """A gated attention unit is attention and MLP in one."""
        return self.mixer_kind(layer) != "gated_attention_unit"

    def is_moe(self, layer: int) -> bool:
        return self.has_mlp(layer) and (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def model_type(self) -> str:
        """The plainest Hugging Face model type that holds this model; "longstride" where only ours does."""
        if any(self.mixer_kind(i) != "full_attention" for i in range(self.num_hidden_layers)):
            return "longstride"
        if any(getattr(self, name) != value for name, value in _PLAIN_SIGNAL.items()):
            return "longstride"
        return family_of(self)

    def validate(self) -> "LanguageConfig":
        """Return self. Raises UserError naming the field and the mend."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"model config: {name} is {getattr(self, name)}; it must be at least 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            raise UserError(
                f"model config: num_key_value_heads ({kv_heads}) does not divide num_attention_heads ({heads}); "
                f"choose one of {divisors}"
            )
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim is {self.head_dim}; rotary embedding needs an even number")
        self._validate_layers()
        self._validate_experts()
        self._validate_signal()
        if self.rope.rope_type not in ("default", "llama3"):
            raise UserError(
                f"model config: rope_type {self.rope.rope_type!r} is not supported; use a checkpoint with 'default' "
                "or 'llama3' rotary embedding"
            )
        turning = self.head_dim * self.rope.partial_rotary_factor
        if not 0 < self.rope.partial_rotary_factor <= 1 or int(turning) % 2 or int(turning) == 0:
            raise UserError(
                f"model config: partial_rotary_factor {self.rope.partial_rotary_factor} turns {turning:g} of head_dim "
                f"{self.head_dim} channels; it must be a positive even number of them"
            )
        if self.rope.rope_theta <= 0:
            raise UserError(f"model config: rope_theta is {self.rope.rope_theta}; it must be positive")
        if self.rope.rope_type == "llama3" and self.rope.high_freq_factor <= self.rope.low_freq_factor:
            raise UserError("model config: high_freq_factor of the llama3 rope must be greater than low_freq_factor")
        if self.rms_norm_eps <= 0:
            raise UserError(
                f"model config: rms_norm_eps is {self.rms_norm_eps}; it must be positive (for example 1e-6)"
            )
        for name, token in self._token_ids():
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"model config: {name} {token} is outside the vocabulary of {self.vocab_size}; "
                    "raise vocab_size or correct the id"
                )
        return self

    def _validate_layers(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(
                f"model config: layer_types names {len(self.layer_types)} layers but num_hidden_layers is "
                f"{self.num_hidden_layers}; give one kind per layer"
            )
        for layer, kind in enumerate(self.layer_types):
            if kind in BIDIRECTIONAL_KINDS:
                raise UserError(
                    f"model config: layer_types names {kind!r} for layer {layer}, which reads later tokens too; "
                    f"a causal policy can have {', '.join(MIXER_KINDS)}"
                )
            if kind not in MIXER_KINDS:
                raise UserError(
                    f"model config: layer_types has the unknown kind {kind!r}; the kinds are {', '.join(MIXER_KINDS)}"
                )
        if not 1 <= self.sparse_summary <= self.sparse_stride:
            raise UserError(
                f"model config: sparse_summary is {self.sparse_summary}; it must lie between 1 and sparse_stride "
                f"({self.sparse_stride})"
            )
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise UserError(
                    f"model config: mlp_only_layers names layer {layer}; layers are 0 to {self.num_hidden_layers - 1}"
                )

    def _validate_experts(self) -> None:
        if self.num_experts < 0:
            raise UserError(f"model config: num_experts is {self.num_experts}; use 0 for a dense model")
        if self.shared_expert_intermediate_size < 0:
            raise UserError("model config: shared_expert_intermediate_size is negative; use 0 for no shared expert")
        if self.num_experts == 0 and self.shared_expert_intermediate_size:
            raise UserError("model config: shared_expert_intermediate_size needs num_experts > 0; set it to 0")
        if self.expert_capacity_factor is not None and self.expert_capacity_factor <= 0:
            raise UserError(
                f"model config: expert_capacity_factor is {self.expert_capacity_factor}; it must be positive (1.25 "
                "leaves a quarter of spare room), or null for no limit"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise unknown_name("scoring_func", self.scoring_func, ("softmax", "sigmoid"))
        if self.routed_scaling_factor <= 0:
            raise UserError(f"model config: routed_scaling_factor is {self.routed_scaling_factor}; it must be positive")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"model config: num_experts_per_tok is {self.num_experts_per_tok}; it must lie between 1 and "
                f"num_experts ({self.num_experts})"
            )
        if self.num_experts:
            self._validate_groups()

    def _validate_groups(self) -> None:
        experts, groups = self.num_experts, self.n_group
        if experts % groups:
            divisors = ", ".join(str(d) for d in range(1, experts + 1) if experts % d == 0)
            raise UserError(
                f"model config: n_group ({groups}) does not divide num_experts ({experts}); choose one of {divisors}"
            )
        if self.topk_group > groups:
            raise UserError(f"model config: topk_group is {self.topk_group}; there are only n_group ({groups}) groups")
        if self.num_experts_per_tok > self.topk_group * (experts // groups):
            raise UserError(
                f"model config: num_experts_per_tok is {self.num_experts_per_tok}, but topk_group ({self.topk_group}) "
                f"groups of {experts // groups} hold fewer experts; raise topk_group"
            )
        if self.router_selection_bias and groups > 1 and experts // groups < 2:
            raise UserError(
                f"model config: n_group ({groups}) leaves groups of one expert, and with router_selection_bias a group "
                "counts by its two best; lower n_group"
            )

    def _validate_signal(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        if self.log_n_from < 0 or self.log_n_from == 1:
            raise UserError(
                f"model config: log_n_from is {self.log_n_from}; give a context length of at least 2, or 0 for none"
            )
        if self.initializer == "fixup" and self.norm_placement != "none":
            raise UserError(
                f"model config: initializer 'fixup' is for layers without norms, but norm_placement is "
                f"{self.norm_placement!r}; set it to 'none', or choose another initializer"
            )

    def _token_ids(self) -> list[tuple[str, int]]:
        single = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        return [(n, t) for n, t in single if t is not None] + [("eos_token_id", t) for t in self.eos_token_id]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> "LanguageConfig":
        """Read a Hugging Face configuration (the content of config.json). Raises UserError for what we cannot run."""
        model_type = config.get("model_type")
        require_known(model_type, source)
        family = FAMILIES[str(model_type)]
        for key, wanted in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
            if key == "use_sliding_window" and model_type == "qwen3":
                continue
            if config.get(key, wanted) != wanted:
                raise UserError(f"{source}: {key} is {config[key]!r}; only {wanted!r} is supported")
        if config.get("quantization_config"):
            raise UserError(f"{source}: quantization_config is set; only unquantised checkpoints are supported")
        missing = [name for name in (*_REQUIRED, *family.required) if config.get(name) is None]
        if missing:
            raise UserError(f"{source}: the field {missing[0]} is missing; is this the config.json of a causal LM?")

        values: dict[str, Any] = {}
        for field_ in dataclasses.fields(cls):
            value = config.get(field_.name)
            if value is None:
                continue
            kinds = field_.type.__args__ if isinstance(field_.type, UnionType) else (field_.type,)
            if kinds[0] in (int, float, bool) and not isinstance(value, (int, *kinds)):
                raise UserError(f"{source}: {field_.name} is {value!r}; it must be a number")
            if kinds[0] is str and not isinstance(value, str):
                raise UserError(f"{source}: {field_.name} is {value!r}; it must be a string")
            if model_type == "longstride" or field_.name not in _SIGNAL_FIELDS:
                values[field_.name] = value
        heads = config["num_attention_heads"]
        if config.get("head_dim") is None:  # older Llama folders leave it out
            values["head_dim"] = 128 if str(model_type).startswith("qwen3") else config["hidden_size"] // max(heads, 1)
        if config.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        values["layer_types"] = tuple(config.get("mixer_kinds") or config.get("layer_types") or ())
        if model_type == "qwen3" and config.get("use_sliding_window"):
            if not config.get("sliding_window"):
                raise UserError(f"{source}: use_sliding_window is set, but sliding_window is missing")
            if not values["layer_types"]:  # folders of transformers 4 say how many of the first layers have no window
                full = config.get("max_window_layers", 28)
                layers = range(config["num_hidden_layers"])
                values["layer_types"] = tuple("full_attention" if i < full else "sliding_attention" for i in layers)
        values["mlp_only_layers"] = tuple(config.get("mlp_only_layers") or ())
        values["rope"] = _rope_from_hf(config, source)
        eos = config.get("eos_token_id")
        values["eos_token_id"] = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        values |= family.read(config, source) | family.fixed
        values.setdefault("tie_word_embeddings", False)  # the default of transformers
        return cls(**values).validate()

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["rope_parameters"] = _rope_to_hf(values.pop("rope"))
        values["eos_token_id"] = (
            None
            if not self.eos_token_id
            else self.eos_token_id[0]
            if len(self.eos_token_id) == 1
            else [*self.eos_token_id]
        )
        kinds = [self.mixer_kind(i) for i in range(self.num_hidden_layers)]
        values["layer_types"] = [STANDARD_KINDS.get(kind, kind) for kind in kinds]
        if values["layer_types"] != kinds:
            values["mixer_kinds"] = kinds
        values["mlp_only_layers"] = list(self.mlp_only_layers)
        family = FAMILIES[self.model_type]
        if self.model_type != "longstride":
            values = {name: value for name, value in values.items() if name not in _MIXER_FIELDS | _SIGNAL_FIELDS}
        values = family.write(values)
        unwritten = family.unwritten | family.fixed.keys()
        return {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **{name: value for name, value in values.items() if name not in unwritten},
        }


_CHOICES = {
    "norm_type": NORM_TYPES, "norm_placement": NORM_PLACEMENTS, "attention_scaling": ATTENTION_SCALINGS,
    "initializer": INITIALIZERS, "parametrization": PARAMETRIZATIONS,
}  # fmt: skip
_POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "decoder_sparse_step", "n_group", "topk_group",
    "max_position_embeddings", "base_hidden_size", "sliding_window", "sparse_stride", "performer_features",
    "gau_chunk_size",
)  # fmt: skip
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_MIXER_FIELDS = {
    "sliding_window", "sparse_stride", "sparse_summary", "performer_features", "gau_chunk_size", "o_proj_bias"
}  # fmt: skip

# What the families of transformers do; the initializer leaves no trace in a model.
_PLAIN_SIGNAL = {
    "norm_type": "rms_norm", "norm_placement": "pre", "attention_scaling": "sqrt", "log_n_from": 0,
    "parametrization": "standard",
}  # fmt: skip
_SIGNAL_FIELDS = {*_PLAIN_SIGNAL, "initializer", "base_hidden_size"}


def _rope_from_hf(config: Mapping[str, Any], source: str) -> RopeConfig:
    """transformers 5 keeps everything in `rope_parameters`; 4 had `rope_theta` and `rope_scaling` side by side."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    given.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    given["rope_type"] = given.pop("type", None) or given.get("rope_type", "default")
    usual = 0.5 if config["model_type"] == "glm4_moe" else 1.0
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", usual))
    if given["rope_type"] == "llama3":
        missing = {f.name for f in dataclasses.fields(RopeConfig)} - given.keys()
        if missing:
            raise UserError(f"{source}: the llama3 rope_parameters lack {', '.join(sorted(missing))}")
    return RopeConfig(**{f.name: given[f.name] for f in dataclasses.fields(RopeConfig) if f.name in given})


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    values = dataclasses.asdict(rope)
    if rope.rope_type == "default":
        values = {name: values[name] for name in ("rope_type", "rope_theta", "partial_rotary_factor")}
    if rope.partial_rotary_factor == 1.0:
        del values["partial_rotary_factor"]
    return values
