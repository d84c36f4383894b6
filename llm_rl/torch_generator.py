"""Generator in plain torch: for machines without vLLM, and what vLLM is checked against."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_rl import weights
from llm_rl.generator import Adapter, Completion, SamplingConfig, context_length, require_context
from models.language.cache import Cache
from models.language.checkpoint import load_checkpoint_tensors, load_pretrained
from models.language.lora import adapter_names, attach
from models.language.packing import Packing
from models.language.peft_folder import config_from_peft, load_adapter_tensors
from models.language.router import RouterTrace
from models.seeding import derive_seed


class TorchGenerator:
    """Samples waves of at most `max_num_seqs` sequences with a key/value cache or recurrent state.

    Each prompt is read once and its cache repeated for its samples; a finished sequence leaves the batch at once.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        record_experts: bool = False,
        version: int = 0,
    ) -> None:
        """max_model_len: longest prompt plus completion, the model's own limit if None. record_experts: completions
        carry what the routers chose. Raises UserError for a model folder that cannot be read, or a max_model_len beyond
        that limit."""
        self.model = load_pretrained(model_folder, getattr(torch, dtype), device).requires_grad_(False)
        self.max_model_len = context_length(self.model.config, max_model_len)
        self.max_num_seqs = max_num_seqs
        self.record_experts = record_experts
        self.version = version
        self.device = device

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, samples: int, seed: int
    ) -> list[list[Completion]]:
        require_context(prompts, sampling, self.max_model_len)
        rows = [prompt for prompt in range(len(prompts)) for _ in range(samples)]
        completions: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(rows), self.max_num_seqs):
            wave = rows[start : start + self.max_num_seqs]
            generator = torch.Generator(self.device).manual_seed(derive_seed(seed, "wave", start))
            for prompt, completion in zip(wave, self._wave([prompts[p] for p in wave], sampling, generator)):
                completions[prompt].append(completion)
        return completions

    def _wave(
        self, prompts: list[Sequence[int]], sampling: SamplingConfig, generator: torch.Generator
    ) -> list[Completion]:
        """One completion of each prompt; equal prompts side by side are read once."""
        done = [Completion([], [], "length", self.version) for _ in prompts]
        if sampling.max_tokens < 1:
            return done
        cache, hidden_BD, experts = self._read(prompts, sampling.max_tokens)
        active = list(range(len(prompts)))
        while True:
            tokens_B, logprobs_B = sample(self.model.logits(hidden_BD), sampling.temperature, generator)
            staying = []
            for slot, (token, logprob) in enumerate(zip(tokens_B.tolist(), logprobs_B.tolist())):
                completion = done[active[slot]]
                completion.tokens.append(token)
                completion.logprobs.append(logprob)
                if token in sampling.stop_token_ids:
                    done[active[slot]] = Completion(completion.tokens, completion.logprobs, "stop", self.version)
                elif len(completion.tokens) < sampling.max_tokens:
                    staying.append(slot)
            if not staying:
                break
            if len(staying) < len(active):
                cache.select(staying)
                tokens_B = tokens_B[staying]
                active = [active[slot] for slot in staying]
            trace = RouterTrace()
            hidden_BD = self.model(tokens_B, Packing.of([1] * len(active), self.device), cache, trace)
            if self.record_experts:
                for owner, row in zip(active, self._chosen(trace)):
                    experts[owner].append(row[None])
        if self.record_experts:
            done = [replace(completion, experts=np.concatenate(rows)) for completion, rows in zip(done, experts)]
        return done

    def _read(self, prompts: list[Sequence[int]], max_tokens: int) -> tuple[Cache, Tensor, list[list[np.ndarray]]]:
        """The cache of all prompts, the hidden state after each prompt's last token [B, D], and the experts of each
        prompt's tokens if they are recorded."""
        unique: list[Sequence[int]] = []
        rows = []
        for prompt in prompts:
            if not unique or prompt is not unique[-1]:
                unique.append(prompt)
            rows.append(len(unique) - 1)
        lengths = [len(prompt) for prompt in unique]
        tokens_T = torch.tensor([token for prompt in unique for token in prompt], device=self.device)
        packing = Packing.of(lengths, self.device)
        cache = self.model.empty_cache(len(unique), max(lengths) + max_tokens)
        trace = RouterTrace()
        hidden_TD = self.model(tokens_T, packing, cache, trace)
        experts: list[list[np.ndarray]] = []
        if self.record_experts:
            chosen = np.split(self._chosen(trace), packing.cu_seqlens[1:-1].tolist())
            experts = [[chosen[row]] for row in rows]
        last_B = packing.cu_seqlens[1:].long() - 1
        if len(rows) > len(unique):
            cache.select(rows)
        return cache, hidden_TD[last_B[rows]], experts

    def _chosen(self, trace: RouterTrace) -> np.ndarray:
        """[T, L, K], in the smallest type that holds an expert's number."""
        dtype = torch.uint8 if self.model.config.num_experts <= 256 else torch.int16
        return torch.stack([record.experts_TK.to(dtype) for record in trace.records], 1).cpu().numpy()

    def load_weights(self, named: Mapping[str, Any], version: int) -> None:
        load_checkpoint_tensors(self.model, weights.tensors(named), "weight update")
        weights.received(self.device)
        self.version = version

    def load_adapter(self, adapter: Adapter, version: int) -> None:
        """Its settings must stay what they were at the first call."""
        if not adapter_names(self.model):
            attach(self.model, config_from_peft(adapter.settings, "the adapter"), seed=0)
            self.model.requires_grad_(False)
        load_adapter_tensors(self.model, dict(weights.tensors(adapter.tensors)), "the adapter")
        self.version = version

    def close(self) -> None:
        del self.model


def sample(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token for each row; returns tokens and their log-probabilities, both [B]. Temperature 0 is greedy."""
    logits_BV = logits_BV.float()
    if temperature > 0:
        logits_BV = logits_BV / temperature
    logprobs_BV = logits_BV.log_softmax(-1)
    if temperature > 0:
        tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator).squeeze(-1)
    else:
        tokens_B = logits_BV.argmax(-1)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None]).squeeze(-1)
