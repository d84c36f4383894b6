"""The learner: one process that holds the policy with its optimizer, on the CPU or on one GPU.

It runs as an actor. Losses are the pure functions of objective.py; this file packs samples into micro-batches,
accumulates gradients over them and steps.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_rl.batch import PackedBatch, Sample, microbatches, pack
from llm_rl.config import LanguageJob, LearnerConfig, LoRASettings, ReasonConfig, RLConfig
from llm_rl.generator import Adapter
from llm_rl.logprobs import token_logprobs
from llm_rl.objective import OBJECTIVES, PolicyBatch, importance_weight, mismatch
from llm_rl.optimizer import MasterAdamW
from llm_rl.weights import CudaExport, export, gpu
from models.errors import UserError
from models.language.balancing import (
    ExpertLoad,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    update_selection_bias,
)
from models.language.checkpoint import load_pretrained, save_pretrained, to_checkpoint
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.lora import LoraConfig, adapter_names, attach, checked_targets, fold, learning_rate_ratios
from models.language.packing import on_device
from models.language.parametrisation import learning_rate_multipliers
from models.language.peft_folder import adapter_settings, adapter_tensors, save_adapter
from models.language.router import RouterTrace

ROUNDING = 1e-9  # an advantage below this is a reward minus the mean of its equals


class Learner:
    def __init__(self, folder: Path, config: LearnerConfig, device: str) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.device, self.folder = config, device, folder
        self.model = load_pretrained(folder, dtype=getattr(torch, config.dtype), device=device)
        self.optimizer = self._optimizer()
        self.export = export if device == "cpu" else CudaExport()

    def _optimizer(self, lr_multipliers: Mapping[str, float] | None = None) -> MasterAdamW:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        config, multipliers = self.config, learning_rate_multipliers(self.model) | dict(lr_multipliers or {})
        return MasterAdamW(named, (config.beta1, config.beta2), config.weight_decay, multipliers)

    def attach_lora(self, settings: LoRASettings, seed: int) -> None:
        """Freeze the policy and train adapters from here on; nothing happens at rank 0."""
        if settings.rank:
            attach(self.model, lora_config(settings), seed)
            self.optimizer = self._optimizer(learning_rate_ratios(self.model, settings.b_lr_ratio))

    def fold_lora(self) -> None:
        """Make the adapters part of the weights, and train every weight from here on."""
        if adapter_names(self.model):
            fold(self.model)
            self.optimizer = self._optimizer()

    def _forward(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, RouterTrace]:
        trace = RouterTrace(batch.replay_TLK)
        hidden_TD = self.model(batch.tokens_T, batch.packing, trace=trace)
        return token_logprobs(hidden_TD[batch.predict_N], self.model.head_weight, batch.targets_N, temperature), trace

    def _router_loss(self, trace: RouterTrace, batch: PackedBatch) -> Tensor | float:
        config, records = self.config, trace.records
        loss: Tensor | float = 0.0
        if not records:
            return loss
        if config.router_aux_loss_coef:
            loss = loss + config.router_aux_loss_coef * load_balancing_loss(records)
        if config.router_sequence_loss_coef:
            packing = batch.packing
            balance = sequence_balancing_loss(records, packing.sequence_T, len(packing.lengths))
            loss = loss + config.router_sequence_loss_coef * balance
        if config.router_z_loss_coef:
            loss = loss + config.router_z_loss_coef * router_z_loss(records)
        return loss

    def _step(self, lr: float, step: int, load: ExpertLoad) -> float:
        """Clip and step; refuse a gradient that is not finite, so that the weights stay as they were. Then the routers'
        selection biases follow the load of the step."""
        norm = self.optimizer.clip(self.config.max_grad_norm)
        if norm != norm or norm == float("inf"):
            self.optimizer.zero_grad()
            raise UserError(
                f"step {step}: the loss or its gradient is not finite (gradient norm {norm}); the last checkpoint is "
                "kept: train again with a lower learning rate or a larger --rl.tau"
            )
        self.optimizer.step(lr)
        biased = [router for router in self.model.routers() if router.has_bias and router.weight.requires_grad]
        if biased and self.config.router_bias_rate:
            update_selection_bias(biased, load, self.config.router_bias_rate)
        return norm

    def sft_step(self, samples: Sequence[Sample], lr: float, step: int) -> dict[str, float]:
        """Optimizer step number `step` on worked solutions: mean negative log-likelihood per completion token.

        The one place where an expert's capacity counts: policy optimisation compares a token's log-probabilities from
        different batches, and what is dropped depends on the batch.
        """
        self.model.train()
        total_tokens = sum(len(sample.completion) for sample in samples)
        lots = list(microbatches(samples, self.config.tokens_per_microbatch))
        loss_sum, load = self._zero(), ExpertLoad()
        for lot in lots:
            batch = pack([samples[i] for i in lot], self.device)
            logprobs_N, trace = self._forward(batch)
            loss = -logprobs_N.sum() / total_tokens
            (loss + self._router_loss(trace, batch) / len(lots)).backward()
            self.optimizer.gather()
            load += ExpertLoad.of(trace.records)
            loss_sum += loss.detach()
        norm = self._step(lr, step, load)
        self.model.eval()
        return {"sft/loss": loss_sum.item(), "sft/grad_norm": norm, "sft/lr": lr, **_figures(load)}

    @torch.no_grad()
    def score(self, samples: Sequence[Sample], temperature: float) -> list[Tensor]:
        """Log-probabilities [C] of each sample's completion under the present weights."""
        scores: dict[int, Tensor] = {}
        for lot in microbatches(samples, self.config.tokens_per_microbatch):
            batch = pack([samples[i] for i in lot], self.device)
            logprobs_N, _ = self._forward(batch, temperature)
            scores.update(zip(lot, logprobs_N.split([len(samples[i].completion) for i in lot])))
        return [scores[i] for i in range(len(samples))]

    def iterate(self, samples: Sequence[Sample], config: RLConfig, lr: float, seed: int, step: int) -> dict[str, float]:
        """One iteration of policy optimisation on the samples of the present policy (k1.5, section 2.3.2).

        The policy at entry is the reference, and the optimizer starts without moments. It ends without them too: they
        would take memory while the engines sample, and room in a checkpoint.

        On a GPU nothing waits for a result between the first micro-batch and the optimizer's step.
        """
        self.optimizer.reset()
        reference = self.score(samples, config.temperature)
        sampler_N = on_device([logprob for s in samples for logprob in s.sampler_logprobs], self.device, torch.float32)
        metrics = mismatch(torch.cat(reference), sampler_N)
        objective = OBJECTIVES[config.objective]
        losses: list[Tensor] = []
        norms: list[float] = []
        weights: list[Tensor] = []
        total_load = ExpertLoad()
        for chosen in whole_groups(samples, config.minibatches, seed):
            minibatch = [samples[i] for i in chosen]
            # Adam scales any gradient up to the rate, so without a signal the routers' loss alone, or the moments of
            # the minibatch before, would move the policy by whole steps.
            signal = any(abs(sample.advantage) > ROUNDING for sample in minibatch)
            lots = list(microbatches(minibatch, self.config.tokens_per_microbatch))
            loss_sum, load = self._zero(), ExpertLoad()
            for lot in lots:
                packed = pack([minibatch[i] for i in lot], self.device)
                logprobs_N, trace = self._forward(packed, config.temperature)
                batch = PolicyBatch(
                    logprobs_N,
                    reference_N=torch.cat([reference[chosen[i]] for i in lot]),
                    sampler_N=packed.sampler_N,
                    sequence_N=packed.sequence_N,
                    advantage_S=packed.advantage_S,
                    denominator=len(minibatch),
                )
                weight_N = importance_weight(batch.reference_N, batch.sampler_N, config.importance_cap)
                loss = objective(batch, weight_N, config.tau)
                if signal:
                    (loss + self._router_loss(trace, packed) / len(lots)).backward()
                    self.optimizer.gather()
                load += ExpertLoad.of(trace.records)
                loss_sum += loss.detach()
                weights.append(weight_N.mean())
            norms.append(self._step(lr, step, load) if signal else 0.0)
            total_load += load
            losses.append(loss_sum)
        self.optimizer.reset()
        metrics |= {
            "train/lr": lr,
            "train/loss": torch.stack(losses).mean().item(),
            "train/grad_norm": sum(norms) / len(norms),
            "train/importance_weight": torch.stack(weights).mean().item(),
            "train/entropy": -sampler_N.mean().item(),  # of the sampled tokens: E[-log π] = H
            "train/tokens": float(sum(len(s.completion) for s in samples)),
        }
        return metrics | _figures(total_load)

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def weights(self) -> dict[str, Any]:
        """The policy under checkpoint names, adapters merged, for the generators."""
        return self.export(to_checkpoint(self.model))

    def weights_on_host(self) -> dict[str, Any]:
        """The same for generators on other GPUs."""
        return export(to_checkpoint(self.model))

    def gpu(self) -> str:
        return gpu()

    def adapter(self) -> Adapter:
        """The adapter alone, for generators that hold the weights below it."""
        return Adapter(adapter_settings(self.model), export(adapter_tensors(self.model)))

    def state(self) -> dict[str, Any]:
        """Everything a resumed learner needs, on the host."""
        state = self.optimizer.state_dict()
        if self.device != "cpu":
            state = _to_host(state)
        frozen = {name: p.detach().cpu() for name, p in self.model.named_parameters() if not p.requires_grad}
        frozen |= {name: bias.detach().cpu() for name, bias in self.model.named_buffers()}  # of routers
        return {"optimizer": state, "frozen": frozen}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        named = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, value in state["frozen"].items():
            named[name].copy_(torch.as_tensor(value))
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder (adapters merged) with the tokenizer that came with the policy."""
        save_pretrained(self.model, folder, tokenizer_files_from=self.folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters alone, as a PEFT folder that belongs to the model that the learner began with."""
        save_adapter(self.model, folder, base_model=str(self.folder.resolve()))


def check_lora(language: LanguageConfig, config: LanguageJob) -> None:
    """Raises UserError for what `attach_lora` would refuse, which may be hours later. Loads no weights."""
    with torch.device("meta"):
        model = Decoder(language).to(getattr(torch, config.learner.dtype))
    for settings in (config.sft.lora, *([config.rl.lora] if isinstance(config, ReasonConfig) else [])):
        if settings.rank:
            checked_targets(model, lora_config(settings))
            learning_rate_ratios(model, settings.b_lr_ratio)


def lora_config(settings: LoRASettings) -> LoraConfig:
    return LoraConfig(
        settings.rank, settings.alpha, settings.targets, settings.use_rslora, settings.use_dora, settings.init
    )


def whole_groups(samples: Sequence[Sample], minibatches: int, seed: int) -> Iterator[list[int]]:
    """Split sample indices into shuffled minibatches that never part the samples of one problem."""
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    minibatches = min(minibatches, len(keys))
    for number in range(minibatches):
        yield [index for key in keys[number::minibatches] for index in groups[key]]


def _figures(load: ExpertLoad) -> dict[str, float]:
    return {f"moe/{name}": value for name, value in load.metrics().items()}


def _to_host(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _to_host(value) for key, value in tree.items()}
    return tree.detach().cpu() if isinstance(tree, Tensor) else tree
