import numpy as np
import pytest
from scipy import stats

from agents.statistics import bootstrap_interval, interquartile_mean


@pytest.mark.parametrize("count", [1, 3, 4, 5, 10, 41])
def test_the_interquartile_mean_is_scipys_trimmed_mean(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=(3, count))
    np.testing.assert_allclose(interquartile_mean(values), stats.trim_mean(values, 0.25, axis=-1))


@pytest.mark.parametrize("statistic", [np.mean, interquartile_mean])
def test_the_interval_is_scipys_percentile_bootstrap(statistic) -> None:
    values = np.random.default_rng(0).exponential(100, size=40)

    def along(values: np.ndarray, axis: int = -1) -> np.ndarray:
        assert axis == -1
        return statistic(values, -1) if statistic is np.mean else statistic(values)

    theirs = stats.bootstrap((values,), along, n_resamples=5000, method="percentile", rng=1).confidence_interval
    width = theirs.high - theirs.low
    assert bootstrap_interval(values, along) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


def test_one_value_has_no_interval() -> None:
    assert bootstrap_interval(np.array([3.0])) == (3, 3)
