"""Figures of few runs, as Agarwal et al. (arXiv 2108.13264) recommend and their library rliable computes them."""

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last dimension of the middle half: floor(E/4) of the E values are left out at each end."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1)


def bootstrap_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] = lambda values: values.mean(-1)
) -> tuple[float, float]:
    """95% interval of a statistic of `values` (E,): Efron's percentile bootstrap, always with the same resamples.

    Of one task rliable's stratified bootstrap is this one, since its strata are the tasks.
    """
    rng = np.random.default_rng(0)
    resampled = statistic(values[rng.integers(len(values), size=(RESAMPLES, len(values)))])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)
