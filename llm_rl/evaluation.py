"""Held-out evaluation: greedy accuracy, pass@1 and pass@k of sampling, and how many tokens an answer takes."""

from collections.abc import Sequence
from math import comb

from llm_rl.generator import Completion


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate 1 - C(n-c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {samples}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def heldout_metrics(
    tag: str,
    families: Sequence[str],
    greedy: Sequence[bool],
    sampled: Sequence[Sequence[bool]],
    completions: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float]],
) -> dict[str, float]:
    """Flat metrics of one evaluation of the policy called `tag` (base, sft, rl, ...).

    One entry per problem in each sequence; `sampled`, `completions` and `rewards` hold that problem's k samples.
    `heldout/pass@1/<tag>` is the mean correctness of sampling, `heldout/greedy/<tag>` that of the greedy answer,
    `heldout/reward/<tag>` the mean reward, which counts answers that are partly right.
    """
    k = len(sampled[0])
    rates = [sum(row) / k for row in sampled]
    metrics = {
        f"heldout/pass@1/{tag}": mean(rates),
        f"heldout/greedy/{tag}": mean(greedy),
        f"heldout/reward/{tag}": mean([reward for row in rewards for reward in row]),
        f"heldout/mean_tokens/{tag}": mean([len(c.tokens) for row in completions for c in row]),
        f"heldout/unfinished/{tag}": mean([c.finish == "length" for row in completions for c in row]),
    }
    if k > 1:
        metrics[f"heldout/pass@{k}/{tag}"] = mean([pass_at_k(k, sum(row), k) for row in sampled])
    for name in sorted(set(families)):
        metrics[f"heldout/pass@1/{tag}/{name}"] = mean([r for r, f in zip(rates, families) if f == name])
    return metrics


def mean(values: Sequence[float] | Sequence[bool]) -> float:
    return sum(values) / len(values)
