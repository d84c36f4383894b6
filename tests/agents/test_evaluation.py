import numpy as np
import pytest
from scipy import stats

from agents.evaluation import Evaluation, bootstrap_interval


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).exponential(100, size=40)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert bootstrap_interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)
    assert bootstrap_interval(np.array([3.0])) == (3, 3)


def test_metrics() -> None:
    found = Evaluation(np.array([1.0, 3.0]), np.array([10, 20])).metrics("eval/sampled")
    assert found["eval/sampled/return_mean"] == 2
    assert found["eval/sampled/return_std"] == 1
    assert found["eval/sampled/length_mean"] == 15
    assert (found["eval/sampled/return_ci95_low"], found["eval/sampled/return_ci95_high"]) == (1, 3)
