"""The learner's side of the comparison: log-probabilities from one packed forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_rl.batch import Sample, pack
from llm_rl.generator import Completion
from models.language.decoder import Decoder


def worst_difference(
    model: Decoder, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float
) -> float:
    """Largest difference between the logprobs that came with the tokens and the learner's, all sequences packed."""
    return differences(model, prompts, groups, temperature).abs().max().item()


@torch.no_grad()
def differences(
    model: Decoder, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float
) -> Tensor:
    """The learner's logprobs of all sampled tokens minus those that came with them, float32 on the CPU."""
    device = model.embed_tokens.weight.device
    batch = pack([Sample(list(p), c.tokens, c.logprobs) for p, group in zip(prompts, groups) for c in group], device)
    hidden_TD = model(batch.tokens_T, batch.packing)
    logits_NV = model.logits(hidden_TD[batch.predict_N]).float() / temperature
    logprobs_N = logits_NV.log_softmax(-1).gather(1, batch.targets_N[:, None])[:, 0]
    return (logprobs_N - batch.sampler_N).cpu()


def moved(model: Decoder, seed: int) -> Decoder:
    """The model after a large step: one tenth of the way to other random weights, and other selection biases."""
    other = Decoder(model.config).init_weights(seed)
    with torch.no_grad():
        for parameter, target in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target.to(parameter), 0.1)
    return with_biases(model, seed)


def with_biases(model: Decoder, seed: int) -> Decoder:
    """The model with selection biases that differ from expert to expert."""
    generator = torch.Generator().manual_seed(seed)
    for bias in model.buffers():
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
    return model
