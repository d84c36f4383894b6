"""DDPO's two estimators of the policy gradient, as pure functions (Black et al. 2023, arXiv 2305.13301).

Denoising is a decision process: the state is (caption, t, x_t), the action x_{t-1}, and the policy the normal
distribution that the scheduler samples it from; the reward of the finished image belongs to every step.
Shapes: B steps, one of each image in a batch; latents (B, Z, h, w).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """One step of each of B images."""

    log_probs_B: Tensor  # under the policy that is trained
    old_log_probs_B: Tensor  # under the policy that sampled
    advantages_B: Tensor


def gaussian_log_prob(x_BZhw: Tensor, mean_BZhw: Tensor, std: float) -> Tensor:
    """log N(x; mean, std²) of each latent, (B,), as the mean over its numbers.

    The mean, not the sum, is what the authors' code takes, and what their clip range of 1e-4 and learning rates suit.
    """
    per_number = -((x_BZhw - mean_BZhw) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return per_number.mean(dim=(1, 2, 3))


def score_function_loss(batch: StepBatch) -> Tensor:
    """−E[A log p]: its gradient is REINFORCE's, DDPO_SF. Right only for samples of the policy that is trained."""
    return -(batch.advantages_B * batch.log_probs_B).mean()


def importance_sampling_loss(batch: StepBatch, clip_range: float) -> Tensor:
    """−E[min(r A, clip(r, 1 − ε, 1 + ε) A)] with r = p/p_old: DDPO_IS, clipped as in PPO (arXiv 1707.06347, eq. 7)."""
    ratio_B = (batch.log_probs_B - batch.old_log_probs_B).exp()
    clipped_B = ratio_B.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio_B * batch.advantages_B, clipped_B * batch.advantages_B).mean()


@torch.no_grad()
def policy_change(batch: StepBatch, clip_range: float) -> dict[str, Tensor]:
    """How far the trained policy is from the sampling one: half the mean squared log-ratio, an estimate of the KL, and
    the share of ratios outside the clip range."""
    log_ratio_B = batch.log_probs_B - batch.old_log_probs_B
    return {
        "train/approx_kl": 0.5 * log_ratio_B.square().mean(),
        "train/clip_fraction": ((log_ratio_B.exp() - 1).abs() > clip_range).float().mean(),
    }
