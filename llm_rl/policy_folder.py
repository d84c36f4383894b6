"""The folder that a language run starts from: the user's model, or a policy made from scratch with its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from envs.reasoning.problem import Problem
from llm_rl.config import PolicyConfig
from llm_rl.tokenizer import train_tokenizer
from models.errors import UserError
from models.language.checkpoint import save_pretrained
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.seeding import derive_seed


def policy_folder(
    model: Path | None, config: PolicyConfig, problems: Sequence[Problem], target: Path, seed: int
) -> Path:
    """Return a Hugging Face folder. A fresh policy is written to `target` once; a resumed run finds it there."""
    if model is not None:
        if not model.is_dir():
            raise UserError(f"--model {model}: no such folder; give a local Hugging Face folder with config.json")
        return model
    if not (target / "config.json").exists():
        make_policy(config, problems, target, seed)
    return target


def make_policy(config: PolicyConfig, problems: Sequence[Problem], target: Path, seed: int) -> None:
    """Train a tokenizer on the problems and write a policy with random weights beside it."""
    texts = [text for p in problems for text in (p.prompt, p.solution or p.answer)]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    language = language_config(
        config, max(config.vocab_size, len(tokenizer)), (tokenizer.eos_token_id,), tokenizer.pad_token_id
    )
    model = Decoder(language).init_weights(derive_seed(seed, "policy"))
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    save_pretrained(model, target)


def language_config(
    config: PolicyConfig, vocab_size: int, eos: tuple[int, ...] = (), pad: int | None = None
) -> LanguageConfig:
    """The shape of a policy made from scratch, not yet validated."""
    dense, standard = config.intermediate_size > 0, config.parametrization == "standard"
    return LanguageConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=len(config.layer_types),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_types=config.layer_types,
        sliding_window=config.sliding_window,
        sparse_stride=config.sparse_stride,
        sparse_summary=config.sparse_summary,
        performer_features=config.performer_features,
        gau_chunk_size=config.gau_chunk_size,
        intermediate_size=config.intermediate_size or config.moe_intermediate_size,
        num_experts=0 if dense else config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        scoring_func=config.scoring_func,
        routed_scaling_factor=config.routed_scaling_factor,
        n_group=config.n_group,
        topk_group=config.topk_group,
        router_selection_bias=config.router_selection_bias,
        shared_expert_intermediate_size=config.shared_expert_intermediate_size,
        shared_expert_gate=config.shared_expert_gate,
        expert_capacity_factor=config.expert_capacity_factor,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        qk_norm=True,
        norm_type=config.norm_type,
        norm_placement=config.norm_placement,
        attention_scaling=config.attention_scaling,
        log_n_from=config.log_n_from,
        initializer=config.initializer,
        # keeps the variance of a projection's input (LeCun); the usual 0.02 suits widths of thousands
        initializer_range=(config.hidden_size if standard else config.base_hidden_size) ** -0.5,
        parametrization=config.parametrization,
        base_hidden_size=config.base_hidden_size,
        eos_token_id=eos,
        pad_token_id=pad,
    )
