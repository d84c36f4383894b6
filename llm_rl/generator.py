"""What a rollout worker asks of whatever samples text. vLLM and plain torch both implement it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from models.errors import UserError
from models.language.config import LanguageConfig


@dataclass(frozen=True)
class SamplingConfig:
    """Log-probabilities are those of the distribution sampled from, after temperature. Temperature 0 is greedy, and its
    log-probabilities are those of temperature 1."""

    temperature: float = 1.0
    max_tokens: int = 256  # new tokens per completion
    stop_token_ids: tuple[int, ...] = ()  # the stop token is kept as the completion's last token


@dataclass(frozen=True)
class Completion:
    """Token-in, token-out: the tokens as sampled, never re-tokenised text."""

    tokens: list[int]
    logprobs: list[float]  # of each token, when it was sampled
    finish: str  # "stop" or "length"
    version: int  # version of the weights that sampled it
    # What the routers chose for each token that was read (prompt and completion but its last token) in each mixture
    # layer: uint8 (int16 for more than 256 experts) [P + C - 1, L, K]. None unless the generator records it.
    experts: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter in PEFT's format: the content of adapter_config.json and of adapter_model.safetensors."""

    settings: dict[str, Any]
    tensors: dict[str, Any]  # name → array, as `llm_rl.weights.export` writes them


class Generator(Protocol):
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, samples: int, seed: int
    ) -> list[list[Completion]]:
        """Return `samples` completions for each prompt (token ids). The same call after the same weights gives the
        same completions. Raises UserError if a prompt plus `max_tokens` is longer than the context."""
        ...

    def load_weights(self, named: Mapping[str, Any], version: int) -> None:
        """Replace the weights in place. named: checkpoint name → array, as `llm_rl.weights.export` writes them."""
        ...

    def load_adapter(self, adapter: Adapter, version: int) -> None:
        """Sample from the folder's weights with this adapter from now on, in the place of the one before.

        Only for generators made with an `adapter_rank`."""
        ...

    def close(self) -> None: ...


def context_length(config: LanguageConfig, max_model_len: int | None) -> int:
    """The longest prompt plus completion. Raises UserError if it is more than the model was made for."""
    if max_model_len is None:
        return config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise UserError(
            f"a context of {max_model_len} tokens is longer than the model's max_position_embeddings "
            f"({config.max_position_embeddings}); shorten prompts or completions, or use another model"
        )
    return max_model_len


def require_context(prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_model_len: int) -> None:
    """Raise UserError if a prompt is empty, or with its completion longer than the context."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens; give at least one")
        if len(prompt) + sampling.max_tokens > max_model_len:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and with max_tokens {sampling.max_tokens} does not fit the "
                f"context of {max_model_len}; shorten the prompt, lower max_tokens or raise max_model_len"
            )
