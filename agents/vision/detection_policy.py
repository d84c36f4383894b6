"""A detector as a policy over whole answers, and its REINFORCE loss.

Each query draws a class from its softmax, "no object" among them, and, if it draws an object, a box from a Gaussian
around the one it predicts. The answer is the set of what was drawn; queries are independent given the image:

    log π(answer) = Σ_q log p(label_q) + Σ_{q with an object} log N(box_q; predicted box_q, σ²)

K answers an image, B images, Q queries, C classes with "no object" last.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    labels_KBQ: Tensor  # int64; C - 1 is "no object"
    boxes_KBQ4: Tensor  # cxcywh; of queries without an object they mean nothing


@torch.no_grad()
def sample_answers(
    logits_BQC: Tensor, boxes_BQ4: Tensor, count: int, std: float, generator: torch.Generator
) -> Answers:
    """Draw `count` answers an image. std 0: boxes are taken as they are predicted."""
    images, queries, classes = logits_BQC.shape
    probabilities = logits_BQC.float().softmax(-1).view(-1, classes)
    drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    noise = torch.randn((count, *boxes_BQ4.shape), generator=generator, device=boxes_BQ4.device)
    return Answers(drawn.T.reshape(count, images, queries), boxes_BQ4.float() + std * noise)


def answer_log_probs(logits_BQC: Tensor, boxes_BQ4: Tensor, answers: Answers, std: float) -> Tensor:
    """log π (K, B). With std 0 the boxes are no part of the decision."""
    log_probs_BQC = logits_BQC.float().log_softmax(-1)
    labels_KBQ = answers.labels_KBQ
    log_probs_KBQ = log_probs_BQC.expand(len(labels_KBQ), -1, -1, -1).gather(-1, labels_KBQ[..., None]).squeeze(-1)
    if std > 0:
        distance = (answers.boxes_KBQ4 - boxes_BQ4.float()) / std
        density_KBQ = (-0.5 * distance.square() - math.log(std * math.sqrt(2 * math.pi))).sum(-1)
        drawn = labels_KBQ < logits_BQC.shape[-1] - 1
        log_probs_KBQ = log_probs_KBQ + density_KBQ.where(drawn, density_KBQ.new_zeros(()))
    return log_probs_KBQ.sum(-1)


def leave_one_out(rewards_KB: Tensor) -> Tensor:
    """Each reward minus the mean of the same image's others (Kool et al., "Buy 4 REINFORCE samples, get a baseline for
    free!", 2019): the baseline does not see its own sample, so the gradient stays unbiased. K is at least 2."""
    count = len(rewards_KB)
    return (rewards_KB - rewards_KB.mean(0)) * (count / (count - 1))


def reinforce_loss(log_probs_KB: Tensor, advantages_KB: Tensor) -> Tensor:
    """Its gradient is minus the gradient of the expected reward."""
    return -(advantages_KB.detach() * log_probs_KB).mean()
