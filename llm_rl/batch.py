"""From samples to packed batches. T tokens of all sequences, N predicted tokens, S sequences; L mixture layers, K
experts per token.

A sequence of P prompt and C completion tokens enters as its first P+C-1 tokens; the last C of those positions
predict the completion. Only they are carried to the output head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.language.packing import Packing, on_device


@dataclass(frozen=True)
class Sample:
    """One trajectory, with all that an objective needs to know of it."""

    prompt: list[int]
    completion: list[int]
    sampler_logprobs: list[float]  # empty in supervised fine-tuning
    advantage: float = 0.0  # reward minus the group's baseline
    group: int = 0  # samples of one problem share a group
    reward: float = 0.0
    experts: np.ndarray | None = None  # [len, L, K]: what the rollout's routers chose, to be used again

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True)
class PackedBatch:
    tokens_T: Tensor
    packing: Packing
    predict_N: Tensor  # positions in T whose output predicts a completion token
    targets_N: Tensor
    sequence_N: Tensor  # sequence that each predicted token belongs to
    sampler_N: Tensor  # log-probability under the sampler
    advantage_S: Tensor
    replay_TLK: Tensor | None  # int64: experts of each token in each mixture layer, if they are given


def pack(samples: Sequence[Sample], device: torch.device | str) -> PackedBatch:
    tokens: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    sampler: list[float] = []
    for index, sample in enumerate(samples):
        first = len(tokens) + len(sample.prompt) - 1
        tokens += sample.prompt
        tokens += sample.completion[:-1]
        predict += range(first, first + len(sample.completion))
        targets += sample.completion
        sequence += [index] * len(sample.completion)
        sampler += sample.sampler_logprobs or [0.0] * len(sample.completion)
    return PackedBatch(
        tokens_T=on_device(tokens, device),
        packing=Packing.of([len(sample) for sample in samples], device),
        predict_N=on_device(predict, device),
        targets_N=on_device(targets, device),
        sequence_N=on_device(sequence, device),
        sampler_N=on_device(sampler, device, torch.float32),
        advantage_S=on_device([sample.advantage for sample in samples], device, torch.float32),
        replay_TLK=_replay(samples, device),
    )


def _replay(samples: Sequence[Sample], device: torch.device | str) -> Tensor | None:
    given = [sample.experts for sample in samples if sample.experts is not None]
    if not given:
        return None
    if [len(experts) for experts in given] != [len(sample) for sample in samples]:
        raise ValueError("the experts of every token of every sample are needed to replay them")
    return on_device(np.concatenate(given), device).long()


def microbatches(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of samples, each lot of at most `max_tokens` tokens counted as (longest × number).

    Sorted by length, so that sequences that are padded together are about as long as each other.
    """
    lot: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i]), i), reverse=True):
        if lot and len(samples[lot[0]]) * (len(lot) + 1) > max_tokens:
            yield lot
            lot = []
        lot.append(index)
    if lot:
        yield lot
