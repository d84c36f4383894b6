"""Parallel, chunked and recurrent forms against the recurrence written out in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.language.linear_attention import Decay, chunked, parallel, recurrent

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(length: int, dtype: torch.dtype = torch.float32, strongest: float = 3.0) -> Inputs:
    """q, k, v, log_g and an initial state; decays from forgetting at once to remembering nearly all."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    log_g = -strongest * torch.rand(2, length, 3, generator=generator, dtype=torch.float64) ** 4
    state = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (q / 8**0.5, k / 8**0.5, v / 3, log_g, state / 3))  # type: ignore[return-value]


def written_out(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = g_t S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t: one batch row, token and head at a time."""
    o = torch.empty_like(v)
    states = []
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            s = state[b, h]
            rows = []
            for t in range(q.shape[1]):
                s = log_g[b, t, h].exp() * s + torch.outer(k[b, t, h], v[b, t, h])
                rows.append(s.T @ q[b, t, h])
            o[b, :, h] = torch.stack(rows)
            states.append(s)
    return o, torch.stack(states).view_as(state)


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "parallel": parallel,
    "chunked": chunked,
    "small chunks": lambda *args: chunked(*args, chunk=8),
    "recurrent": recurrent,
}


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("form", FORMS)
def test_forward(form: str, length: int) -> None:
    *sequence, state = inputs(length)
    for start in (state, None):
        initial = torch.zeros_like(state) if start is None else state
        expected = written_out(*(x.double() for x in (*sequence, initial)))
        for ours, theirs in zip(FORMS[form](*sequence, start), expected, strict=True):
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str) -> None:
    """Of outputs and final state with respect to all inputs, the initial state included."""

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs(70, torch.float64)]
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
            for x in function(*leaves)
        )
        return [g.double() for g in torch.autograd.grad(total, leaves)]

    for ours, theirs in zip(gradients(FORMS[form], torch.float32), gradients(written_out, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_decays_stay_finite(form: str) -> None:
    *sequence, log_g, state = inputs(130)
    log_g = log_g.clone()
    log_g[:, ::3] = -80.0  # exp(+80 · chunk) would overflow float32
    leaves = [x.requires_grad_() for x in (*sequence, log_g, state)]
    o, last = FORMS[form](*leaves)
    expected, _ = written_out(*(x.detach().double() for x in leaves))
    torch.testing.assert_close(o.detach().double(), expected, atol=1e-5, rtol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum() + last.sum(), leaves))


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_in_two_pieces(form: str) -> None:
    *sequence, state = inputs(100)
    whole, last = FORMS[form](*sequence, state)
    first, between = FORMS[form](*(x[:, :37] for x in sequence), state)
    second, end = FORMS[form](*(x[:, 37:] for x in sequence), between)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, last, atol=1e-5, rtol=0)


def test_initial_decays_are_spread_over_the_heads() -> None:
    bias = Decay.initial_bias(8)
    g = torch.exp(-torch.nn.functional.softplus(bias))
    assert g[0].item() == pytest.approx(0.9, abs=1e-4)
    assert g[-1].item() == pytest.approx(0.999, abs=1e-5)
    assert (g.diff() > 0).all()
