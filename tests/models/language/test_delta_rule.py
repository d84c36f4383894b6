"""Chunk sizes, states handed on, and groups of chunks; tests/models/language/attention_oracles.py has the oracle."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.language import delta_rule, linear_attention
from models.language.delta_rule import chunked, recurrent


def inputs(length: int, strongest: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for _ in range(3))
    log_g = -strongest * torch.rand(2, length, 3, generator=generator) ** 4
    beta = torch.rand(2, length, 3, generator=generator)
    return [normalize(q, dim=-1), normalize(k, dim=-1), v, log_g, beta]


def a_state() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 64), (65, 64), (150, 8), (330, 4)]
)  # 330 / 4: three groups of chunks
def test_chunk_by_chunk_equals_token_by_token(length: int, chunk: int) -> None:
    sequence, state = inputs(length), a_state()
    for ours, expected in zip(chunked(*sequence, state, chunk=chunk), recurrent(*sequence, state), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_sequence_in_two_pieces() -> None:
    sequence, state = inputs(100), a_state()
    whole, last = chunked(*sequence, state)
    first, between = chunked(*(x[:, :37] for x in sequence), state)
    second, end = chunked(*(x[:, 37:] for x in sequence), between)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-5, rtol=0)


def test_extreme_decays_stay_finite() -> None:
    *sequence, log_g, beta = inputs(130)
    log_g[:, ::3] = -80.0
    leaves = [x.requires_grad_() for x in (*sequence, log_g, beta)]
    o, last = chunked(*leaves)
    torch.testing.assert_close(o, recurrent(*leaves)[0], atol=1e-5, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum() + last.sum(), leaves))


def test_a_key_is_overwritten_not_added_to() -> None:
    key = normalize(torch.ones(1, 2, 1, 8), dim=-1)
    value = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1).expand(1, 2, 1, 8)
    kept, written = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    delta, _ = delta_rule.chunked(key, key, value, kept, written)
    linear, _ = linear_attention.chunked(key, key, value, kept)
    assert delta[0, 1, 0, 0].item() == pytest.approx(5.0, abs=1e-5)
    assert linear[0, 1, 0, 0].item() == pytest.approx(6.0, abs=1e-5)


def test_zeros_leave_the_state_as_it_is() -> None:
    state = a_state()
    nothing = [torch.zeros(2, 70, 3, 8)] * 3 + [torch.zeros(2, 70, 3)] * 2
    torch.testing.assert_close(chunked(*nothing, state)[1], state, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 5, 16, 32, 48, 64, 128])
def test_the_inverse_of_a_triangular_system(size: int) -> None:
    """Also of keys that repeat, where powers of the matrix would be huge."""
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(3, size, size, generator=generator)
    for a in (random / size**0.5, torch.ones(2, 2, size, size)):
        a = a.clone().requires_grad_()
        plain = a.double().tril(-1) + torch.eye(size, dtype=torch.float64)
        direction = torch.randn(a.shape, generator=generator)
        (exact,) = torch.autograd.grad((plain.inverse() * direction).sum(), a)
        ours = delta_rule.unit_lower_inverse(a)
        torch.testing.assert_close(ours.double(), plain.inverse(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), a)[0], exact, atol=1e-4, rtol=1e-4)


def test_versions_of_triton_that_are_wrong_on_hopper() -> None:
    assert [delta_rule.is_wrong_on_hopper(v) for v in ("3.3.1", "3.4.0+git12", "3.6.0", "3.7.0", "3.7.1")] == [
        False, True, True, True, False,
    ]  # fmt: skip
