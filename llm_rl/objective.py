"""Policy objectives: pure functions from one typed batch to a loss.

N predicted tokens, S sequences. log π of a sequence is the sum over its tokens; Δ = log π_θ - log π_ref of the
sequence, where the reference is the policy at the start of the iteration. All losses are sums over sequences divided
by `denominator`, so micro-batches of one optimizer step add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyBatch:
    logprobs_N: Tensor  # log π_θ of each sampled token, with gradient
    reference_N: Tensor  # the same under the policy at the iteration's start, computed by the learner
    sampler_N: Tensor  # the same as the sampler reported it
    sequence_N: Tensor  # sequence of each token
    advantage_S: Tensor
    denominator: float  # sequences in the whole optimizer step

    def per_sequence(self, values_N: Tensor) -> Tensor:
        return values_N.new_zeros(len(self.advantage_S)).index_add(0, self.sequence_N, values_N)

    @property
    def delta_S(self) -> Tensor:
        return self.per_sequence(self.logprobs_N - self.reference_N)


def importance_weight(reference_N: Tensor, sampler_N: Tensor, cap: float) -> Tensor:
    """min(π_ref/π_sampler, cap) per token: corrects for a sampler whose numerics differ from the learner's.

    Truncated importance sampling (Ionides 2008). Exactly 1 where both agree.
    """
    return (reference_N - sampler_N).exp().clamp(max=cap).detach()


def mirror_descent(batch: PolicyBatch, weight_N: Tensor, tau: float) -> Tensor:
    """Kimi k1.5 (arXiv 2501.12599) eq. 3: ascent along (1/k) Σ_j (r_j - r̄ - τ Δ_j) ∇ log π_θ(y_j).

    This is -1/(2τ) times the gradient of (r_j - r̄ - τ Δ_j)², so a sequence is at rest at Δ_j = (r_j - r̄)/τ, and at
    Δ = 0 it is REINFORCE with a mean baseline. No clipping, no value network, no division by a deviation.
    """
    pull_S = (batch.advantage_S - tau * batch.delta_S).detach()
    return -(pull_S[batch.sequence_N] * weight_N * batch.logprobs_N).sum() / batch.denominator


def rloo(batch: PolicyBatch, weight_N: Tensor, tau: float) -> Tensor:
    """REINFORCE with the leave-one-out baseline that `advantages` gives (Ahmadian et al. 2024), KL pull as above."""
    return mirror_descent(batch, weight_N, tau)


def grpo(batch: PolicyBatch, weight_N: Tensor, tau: float, low: float = 0.2, high: float = 0.28) -> Tensor:
    """Token-level clipped surrogate (DeepSeekMath eq. 3 with DAPO's asymmetric clip); no KL term, so tau is unused."""
    ratio_N = (batch.logprobs_N - batch.reference_N).exp()
    advantage_N = batch.advantage_S[batch.sequence_N]
    surrogate_N = torch.min(ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N)
    lengths_S = batch.per_sequence(torch.ones_like(ratio_N)).clamp(min=1)
    return -(weight_N * surrogate_N / lengths_S[batch.sequence_N]).sum() / batch.denominator


def rest(batch: PolicyBatch, weight_N: Tensor, tau: float) -> Tensor:
    """ReST (Gulcehre et al. 2023): likelihood of the completions whose reward passed the filter; no negative push.

    It imitates given completions, as fine-tuning does, so the sampler's part in them (weight_N) and tau are unused.
    """
    return -(batch.advantage_S[batch.sequence_N] * batch.logprobs_N).sum() / batch.denominator


Objective = Callable[[PolicyBatch, Tensor, float], Tensor]
OBJECTIVES: dict[str, Objective] = {"mirror_descent": mirror_descent, "rloo": rloo, "grpo": grpo, "rest": rest}


def advantages(rewards: Sequence[float], objective: str) -> list[float]:
    """Rewards of one group of k samples → what multiplies ∇ log π in the named objective."""
    count = len(rewards)
    mean = sum(rewards) / count
    if objective == "mirror_descent":
        return [reward - mean for reward in rewards]
    if objective == "rloo":
        return [(reward - mean) * count / (count - 1) for reward in rewards]
    if objective == "grpo":
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5
        return [(reward - mean) / (deviation + 1e-6) for reward in rewards]
    if objective == "rest":
        return [1.0 if reward >= 0.99 else 0.0 for reward in rewards]
    raise KeyError(objective)


def mismatch(reference_N: Tensor, sampler_N: Tensor) -> dict[str, float]:
    """How far the sampler's numerics are from the learner's: KL(sampler ‖ learner) by the k3 estimator, and maximum.

    k3 = e^d - 1 - d with d = log π_learner - log π_sampler (Schulman, "Approximating KL divergence").
    """
    difference_N = (reference_N - sampler_N).double()
    return {
        "train/mismatch_kl": (difference_N.exp() - 1 - difference_N).mean().item(),
        "train/mismatch_max": difference_N.abs().max().item(),
    }
