import numpy as np
import pytest
import torch
from torch import distributions

from models.control.distributions import Categorical, DiagonalGaussian

GENERATOR = torch.Generator().manual_seed(0)


def categorical(*shape: int) -> tuple[Categorical, distributions.Distribution]:
    logits = torch.randn(*shape, generator=GENERATOR)
    return Categorical(logits.log_softmax(-1)), distributions.Categorical(logits=logits)


def gaussian(*shape: int) -> tuple[DiagonalGaussian, distributions.Distribution]:
    mean, log_std = torch.randn(*shape, generator=GENERATOR), torch.randn(shape[-1], generator=GENERATOR)
    return DiagonalGaussian(mean, log_std), distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_they_agree_with_torch(make) -> None:
    (ours, theirs), (other, their_other) = make(5, 7, 3), make(5, 7, 3)
    actions = theirs.sample()
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.kl(other), distributions.kl_divergence(theirs, their_other), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.kl(ours.detach()), torch.zeros(5, 7), atol=1e-6, rtol=0)


def test_samples_are_those_of_the_distribution() -> None:
    discrete = Categorical(torch.tensor([0.7, 0.2, 0.1]).log().expand(100_000, 3))
    counts = torch.bincount(discrete.sample(GENERATOR)) / 100_000
    np.testing.assert_allclose(counts, [0.7, 0.2, 0.1], atol=0.01)
    continuous = DiagonalGaussian(torch.tensor([1.0, -2.0]).expand(100_000, 2), torch.tensor([0.0, 1.0]))
    samples = continuous.sample(GENERATOR)
    np.testing.assert_allclose(samples.mean(0), [1, -2], atol=0.03)
    np.testing.assert_allclose(samples.std(0), [1, np.e], atol=0.03)
