"""Every recurrent kind as a layer: pieces of any length, through prompts and single tokens, give one answer."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.language.kernel_attention import PerformerAttention, orthogonal_gaussian, redraw_features
from models.language.mixers import MIXERS
from models.language.packing import Packing
from models.language.recurrent import RecurrentMixer
from models.language.rope import inverse_frequencies, rotation
from tests.models.language.policies import RECURRENT, RECURRENT_KINDS

LENGTH = 150


def layer(kind: str) -> RecurrentMixer:
    """With random weights of size 1, so that every part of it matters."""
    mixer = MIXERS[kind](RECURRENT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and len(parameter) > 4 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return mixer


def run(mixer: RecurrentMixer, x_LD: Tensor, pieces: list[int]) -> Tensor:
    """Feed a sequence beside a shifted copy of itself, piece by piece."""
    cache, outputs, read = mixer.empty_cache(2, LENGTH), [], 0
    frequency = inverse_frequencies(RECURRENT.rope, RECURRENT.head_dim)
    for length in pieces:
        packing = Packing.of([length, length], starts=[read, read])
        x_TD = torch.cat([x_LD[read : read + length], x_LD.roll(1, 0)[read : read + length]])
        outputs.append(mixer(x_TD, packing, rotation(frequency, packing.positions_T, x_TD.dtype), cache))
        read += length
    return torch.cat([o.view(2, -1, o.shape[-1]) for o in outputs], 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", RECURRENT_KINDS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [37, 1, 1, 11, 64, 1, 35], [16, 16, 118], [17, 15, 1, 117]], ids=len)
def test_pieces(kind: str, pieces: list[int]) -> None:
    mixer = layer(kind)
    x_LD = torch.randn(LENGTH, RECURRENT.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = run(mixer, x_LD, [LENGTH])
    assert whole.std() > 0.05
    torch.testing.assert_close(run(mixer, x_LD, pieces), whole, atol=1e-5 * max(1.0, whole.abs().max().item()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_a_state_has_the_size_that_the_kind_says(kind: str) -> None:
    mixer = layer(kind)
    cache = mixer.empty_cache(3, LENGTH)
    assert cache.state.shape == (3, *mixer.state_shape)
    assert cache.state.count_nonzero() == 0
    packing = Packing.of([5, 40, 1])
    frequency = inverse_frequencies(RECURRENT.rope, RECURRENT.head_dim)
    mixer(torch.randn(46, 64), packing, rotation(frequency, packing.positions_T, torch.float32), cache)
    assert cache.state.shape == (3, *mixer.state_shape)
    assert cache.state.abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_a_pack_of_unequal_lengths_has_finite_gradients(kind: str) -> None:
    """Padding rows compute 0 / 0 if nobody takes care, and NaN · 0 is NaN."""
    mixer = layer(kind)
    packing = Packing.of([5, 40, 1])
    frequency = inverse_frequencies(RECURRENT.rope, RECURRENT.head_dim)
    cos_sin = rotation(frequency, packing.positions_T, torch.float32)
    x_TD = torch.randn(46, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mixer(x_TD, packing, cos_sin, None).square().sum().backward()
    for tensor in (x_TD, *(p for p in mixer.parameters() if p.requires_grad)):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


class LargestTensor(TorchDispatchMode):
    """The most numbers in any tensor that an operation inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_training_makes_nothing_that_grows_with_the_square_of_the_length(kind: str) -> None:
    mixer, largest = layer(kind), {}
    frequency = inverse_frequencies(RECURRENT.rope, RECURRENT.head_dim)
    for length in (4096, 8192):
        packing = Packing.of([length])
        cos_sin = rotation(frequency, packing.positions_T, torch.float32)
        x_TD = torch.zeros(length, RECURRENT.hidden_size, requires_grad=True)
        with LargestTensor() as watch:
            mixer(x_TD, packing, cos_sin, None).sum().backward()
        largest[length] = watch.numbers
    assert largest[8192] <= 2.1 * largest[4096]
    assert largest[8192] < 8192**2 / 8


@torch.no_grad()
def test_performer_estimates_softmax_attention() -> None:
    """The estimate of exp(qᵀk/√C) has no bias, and orthogonal features beat independent ones (Choromanski et al.)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 20, 16, generator=generator, dtype=torch.float64).unbind(0)
    q, k = q / 2, k / 2  # at size 1 a few draws decide the error
    exact = (q @ k.T / 4).exp()

    def estimate(projection: Tensor) -> Tensor:
        def phi(x: Tensor) -> Tensor:
            x = x / 2
            return (x @ projection.double().T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(projection))

        return phi(q) @ phi(k).T

    draws = [estimate(orthogonal_gaussian(16, 16, generator)) for _ in range(2000)]
    independent = [estimate(torch.randn(16, 16, generator=generator)) for _ in range(2000)]
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((mean - exact).abs() / spread).mean() < 1.5  # about 0.8 for an unbiased estimate
    error, independent_error = ((torch.stack(x) / exact - 1).square().mean() for x in (draws, independent))
    assert error < independent_error


def test_random_features_are_orthogonal_and_drawn_by_seed() -> None:
    mixer = MIXERS["performer_attention"](RECURRENT)
    assert isinstance(mixer, PerformerAttention)
    assert not mixer.projection.requires_grad
    drawn = []
    for seed in (0, 0, 1):
        redraw_features(mixer, seed)
        drawn.append(mixer.projection.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    block = drawn[0][:16]  # 24 features of 16 channels: a whole block and half of another
    gram = block @ block.T
    torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-4, rtol=0)
    assert gram.diag().mean().item() == pytest.approx(16, rel=0.3)  # lengths are those of Gaussian vectors
