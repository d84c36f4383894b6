"""The learner's side of the comparison: log-probabilities from one packed forward pass."""

from collections.abc import Sequence

import torch

from llm_rl.generator import Completion
from models.language.decoder import Decoder
from models.language.packing import Packing


@torch.no_grad()
def worst_difference(
    model: Decoder, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Completion]], temperature: float
) -> float:
    """Largest difference between the logprobs that came with the tokens and the learner's, all sequences packed."""
    pairs = [(list(prompt), c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    sequences = [prompt + c.tokens for prompt, c in pairs]
    tokens_T = torch.tensor([token for sequence in sequences for token in sequence])
    lengths = [len(sequence) for sequence in sequences]
    logprobs_TV = (model.logits(model(tokens_T, Packing.of(lengths))) / temperature).log_softmax(-1)
    worst = 0.0
    for (prompt, c), tokens, logprobs in zip(pairs, tokens_T.split(lengths), logprobs_TV.split(lengths), strict=True):
        ours = logprobs[len(prompt) - 1 : -1].gather(-1, tokens[len(prompt) :, None]).squeeze(-1)
        worst = max(worst, (ours - torch.tensor(c.logprobs)).abs().max().item())
    return worst


def moved(model: Decoder, seed: int) -> Decoder:
    """The model after a large step: one tenth of the way to other random weights, and other selection biases."""
    other = Decoder(model.config).init_weights(seed)
    with torch.no_grad():
        for parameter, target in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target, 0.1)
    return with_biases(model, seed)


def with_biases(model: Decoder, seed: int) -> Decoder:
    """The model with selection biases that differ from expert to expert."""
    generator = torch.Generator().manual_seed(seed)
    for bias in model.buffers():
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
    return model
