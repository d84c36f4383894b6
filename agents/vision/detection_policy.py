"""A detector as a policy over whole answers, and its REINFORCE loss.

Each query draws a class from its softmax, "no object" among them: the answer is the set of objects drawn, with the
boxes that their queries predict. Queries are independent given the image, so log π(answer) = Σ_q log p(label_q).

K answers an image, B images, Q queries, C classes with "no object" last.
"""

import torch
from torch import Tensor


@torch.no_grad()
def sample_answers(logits_BQC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` answers an image: labels (K, B, Q) int64, where C - 1 is "no object"."""
    images, queries, classes = logits_BQC.shape
    probabilities = logits_BQC.float().softmax(-1).view(-1, classes)
    drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    return drawn.T.reshape(count, images, queries)


def answer_log_probs(logits_BQC: Tensor, labels_KBQ: Tensor) -> Tensor:
    """log π (K, B)."""
    log_probs_BQC = logits_BQC.float().log_softmax(-1)
    return log_probs_BQC.expand(len(labels_KBQ), -1, -1, -1).gather(-1, labels_KBQ[..., None]).squeeze(-1).sum(-1)


def leave_one_out(rewards_KB: Tensor) -> Tensor:
    """Each reward minus the mean of the same image's others (Kool et al., "Buy 4 REINFORCE samples, get a baseline for
    free!", 2019): the baseline does not see its own sample, so the gradient stays unbiased. K is at least 2."""
    count = len(rewards_KB)
    return (rewards_KB - rewards_KB.mean(0)) * (count / (count - 1))


def reinforce_loss(log_probs_KB: Tensor, advantages_KB: Tensor) -> Tensor:
    """Its gradient is minus the gradient of the expected reward."""
    return -(advantages_KB.detach() * log_probs_KB).mean()
