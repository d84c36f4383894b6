"""Configuration of the language jobs. Plain dataclasses: the command line and the YAML recipes are built from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from envs.reasoning.scene_prompts import SceneJudgeConfig
from models.errors import UserError


@dataclass
class PolicyConfig:
    """A policy made from scratch when `--model` names no folder. Names follow Hugging Face's Qwen3-MoE config."""

    vocab_size: int = 512  # a byte-level BPE of this size is trained on the problems
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    # One kind for each layer; docs/attention.md lists them, and which of the next five fields each kind reads.
    layer_types: tuple[str, ...] = ("linear_attention", "full_attention", "linear_attention", "full_attention")
    sliding_window: int = 256
    sparse_stride: int = 64
    sparse_summary: int = 8
    performer_features: int = 64
    gau_chunk_size: int = 256
    intermediate_size: int = 0  # 0: every MLP is a mixture of experts
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"  # of the router
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # groups of experts; a token's experts come from its best topk_group groups
    topk_group: int = 1
    router_selection_bias: bool = False  # balance by a bias instead of a loss: also set learner.router_aux_loss_coef 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = True
    expert_capacity_factor: float | None = None  # in SFT, drop what an expert has no room for; None: drop nothing
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_placement: Literal["pre", "post", "sandwich", "deepnorm", "none"] = "pre"
    attention_scaling: Literal["sqrt", "inverse", "none"] = "sqrt"  # q · k / √head_dim, q · k / head_dim, q · k
    log_n_from: int = 0  # attention logits times log n / log this beyond this many tokens; 0: never
    initializer: Literal["truncated_normal", "xavier", "he", "lecun", "orthogonal", "t5", "deepnorm", "fixup"] = (
        "truncated_normal"
    )
    parametrization: Literal["standard", "ntk", "mup"] = "standard"  # what follows the width, and how
    base_hidden_size: int = 128  # the width at which "mup" and "ntk" are "standard"


@dataclass
class LoRASettings:
    """rank 0 updates every weight; a positive rank trains low-rank adapters (models/language/lora_layers.py)."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # or all-linear, experts.gate_up_proj, ...
    use_rslora: bool = False  # scale by alpha / sqrt(rank) in place of alpha / rank
    use_dora: bool = False  # train the length of each row apart from its direction
    init: Literal["uniform", "pissa"] = "uniform"  # pissa: from the weights' first singular vectors
    b_lr_ratio: float = 1.0  # LoRA+: learning rate of B over that of A
    # What the workers get at each sync. merged: whole weights. adapter: it alone, beside the weights of --model.
    serve: Literal["merged", "adapter"] = "merged"


@dataclass
class LearnerConfig:
    dtype: Literal["float32", "bfloat16"] = "float32"  # compute; with bfloat16 the optimizer keeps float32 masters
    tokens_per_microbatch: int = 8192  # packed tokens in one forward and backward pass
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    router_aux_loss_coef: float = 0.01  # Switch load-balancing loss over a micro-batch
    router_sequence_loss_coef: float = 0.0  # the same loss within each sequence
    router_z_loss_coef: float = 0.0
    router_bias_rate: float = 0.001  # step of a selection bias, for policies that have one; 0 leaves it as it is
    threads: int = 2  # CPU threads of the learner
    gpu_share: float = 0.4  # share of a GPU that Ray accounts to the learner
    timeout_s: float = 3600.0  # a step that takes longer ends the job; its state is in the last checkpoint


@dataclass
class RolloutConfig:
    """The workers that sample, each with an engine of its own."""

    workers: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_num_seqs: int = 128  # sequences decoded together by one worker
    kv_cache_gib: float = 0.25
    enforce_eager: bool = True
    gpu_share: float = 0.3  # share of a GPU that Ray accounts to each worker
    timeout_s: float = 600.0  # a rollout or weight-sync call that takes longer ends its worker


@dataclass
class SFTConfig:
    """Supervised fine-tuning on the problems' worked solutions."""

    problems: tuple[str, ...] = ()  # sources; () uses the job's own problems
    count: int = 4096  # problems drawn from each generated source
    steps: int = 0  # optimizer steps; 0 skips the phase
    batch_size: int = 64  # examples per optimizer step
    lr: float = 2e-3
    warmup: int = 20
    final_lr_ratio: float = 0.1  # cosine decay to this share of lr
    direct_share: float = 0.0  # share of the examples that answer at once, with nothing between the thinking marks
    lora: LoRASettings = field(default_factory=LoRASettings)  # folded into the weights when the phase ends


@dataclass
class RLConfig:
    """Policy optimisation as in Kimi k1.5, sections 2.3.2 to 2.3.4."""

    iterations: int = 50
    objective: Literal["mirror_descent", "grpo", "rloo", "rest"] = "mirror_descent"
    problems_per_iteration: int = 32
    samples: int = 8  # k completions per problem
    minibatches: int = 4  # optimizer steps per iteration; whole groups stay together
    lr: float = 1e-4
    final_lr_ratio: float = 0.1  # the rate falls linearly to this share of it over the iterations
    tau: float = 0.1  # weight of the pull towards the iteration's reference policy
    temperature: float = 1.0
    max_tokens: int = 128  # new tokens per completion
    router_replay: bool = False  # the learner sends every token to the experts that the rollout chose (R3)
    importance_cap: float = 2.0  # truncation of the learner/sampler importance ratio
    length_reward: float = 0.0  # weight of the length reward; 0 leaves it off
    length_reward_from: int = 0  # iteration at which the length reward starts
    sampling: Literal["uniform", "prioritised"] = "prioritised"
    curriculum: bool = True  # admit problems from easy to hard
    admit_at: float = 0.6  # success rate at the current difficulty that admits the next one
    lora: LoRASettings = field(default_factory=LoRASettings)


@dataclass
class EvalConfig:
    """Held-out problems: never trained on. A training file's problems with the same prompt are left out and counted."""

    problems: tuple[str, ...] = ()  # sources; () holds out problems of the training sources
    count: int = 100  # problems from each source
    samples: int = 4  # completions per problem for pass@1 and pass@k
    every: int = 0  # RL iterations between evaluations; 0 evaluates at the phases' ends only


@dataclass
class LanguageJob:
    """What `sft` and `reason` share."""

    model: Path | None = None  # a Hugging Face folder (Qwen3, Qwen3-MoE, Llama, or ours); None makes `policy`
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    problems: tuple[str, ...] = ()  # `gym:FAMILY?param=value`, `scene:prompt`, or a .jsonl/.parquet file
    count: int = 2000  # problems drawn from each generated source
    system_prompt: str = ""
    engine: Literal["vllm", "torch"] = "vllm"  # who samples; there is no fallback from one to the other
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save_every: int = 10  # RL iterations (or 20 times as many SFT steps) between checkpoints
    verifier_workers: int = 1
    verifier_timeout_s: float = 5.0
    scene: SceneJudgeConfig = field(default_factory=SceneJudgeConfig)  # the verifier of scene:prompt


@dataclass
class ReasonConfig(LanguageJob):
    rl: RLConfig = field(default_factory=RLConfig)


@dataclass
class SFTJobConfig(LanguageJob):
    max_tokens: int = 128  # new tokens per completion in evaluation
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(steps=500))


_AT_LEAST_ONE = (
    "count", "save_every", "verifier_workers", "eval.count", "eval.samples", "rollout.workers", "rollout.max_num_seqs",
    "learner.tokens_per_microbatch", "learner.threads", "sft.batch_size", "sft.count", "max_tokens", "rl.samples",
    "rl.minibatches", "rl.problems_per_iteration", "rl.max_tokens",
)  # fmt: skip
_POSITIVE = (
    "rollout.kv_cache_gib", "rollout.timeout_s", "learner.timeout_s", "learner.max_grad_norm", "sft.lr", "rl.lr",
    "rl.importance_cap",
)  # fmt: skip
_NOT_NEGATIVE = (
    "eval.every", "sft.steps", "sft.warmup", "rl.iterations", "rl.tau", "rl.temperature", "rl.length_reward_from",
    "rl.final_lr_ratio", "sft.final_lr_ratio", "learner.weight_decay", "learner.router_aux_loss_coef",
    "learner.router_sequence_loss_coef", "learner.router_z_loss_coef", "learner.router_bias_rate",
)  # fmt: skip
_BELOW_ONE = ("learner.beta1", "learner.beta2")


def require_sizes(config: LanguageJob) -> None:
    """Raise UserError for a number that no run could have, before anything is started."""
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_AT_LEAST_ONE, lambda value: value > 0, "at least 1"),
        (_POSITIVE, lambda value: value > 0, "positive"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        (_BELOW_ONE, lambda value: 0 <= value < 1, "at least 0 and below 1"),
    )
    for names, holds, rule in rules:
        for name in names:
            section, _, field_name = name.rpartition(".")
            owner = getattr(config, section, None) if section else config  # `rl` is of one of the jobs
            value = getattr(owner, field_name, None)
            if value is not None and not holds(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: it must be {rule}")
