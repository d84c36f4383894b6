import numpy as np
import pytest

from agents.moments import Moments, Normalizer


def test_merged_moments_are_those_of_all_values() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4, 3, size=(n, 2)) for n in (1, 0, 7, 500)]
    merged = Moments.none(2)
    for part in parts:
        merged = merged.merged(Moments.of(part))
    values = np.concatenate(parts)
    assert merged.count == 508
    np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.std(), values.std(0), rtol=1e-6)


def test_nothing_counted_changes_nothing() -> None:
    normalizer = Normalizer.from_moments(Moments.none(2))
    np.testing.assert_array_equal(normalizer(np.array([3.0, -4.0])), [3, -4])


def test_the_normalizer_centres_scales_and_clips() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=(1000, 1))
    normalizer = Normalizer.from_moments(Moments.of(values))
    normal = normalizer(values)
    assert normal.mean() == pytest.approx(0, abs=1e-5)
    assert normal.std() == pytest.approx(1, abs=1e-5)
    assert normalizer(np.array([1e9, -1e9])).tolist() == [10, -10]


def test_moments_survive_a_checkpoint() -> None:
    moments = Moments.of(np.random.default_rng(0).normal(size=(10, 3)))
    again = Moments.from_state(moments.state())
    np.testing.assert_array_equal(again.m2, moments.m2)
    np.testing.assert_array_equal(again.mean, moments.mean)
