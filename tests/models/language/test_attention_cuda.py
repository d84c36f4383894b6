"""Attention operators on a GPU, forward and backward, against the plain forms in float32 on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.language import delta_rule, linear_attention
from models.language.attention import packed_attention
from models.language.interval_attention import interval_attention
from models.language.packing import Packing
from models.language.sparse_patterns import Fixed, Pattern, Sliding, Strided

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (150, 1, 17, 64)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of a random projection of it, as float32 on the CPU."""
    leaves = [x.to(device) for x in inputs]
    leaves = [(x.to(dtype) if x.ndim == inputs[0].ndim else x).detach().requires_grad_() for x in leaves]  # not gates
    output = function(*leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [x.float().cpu() for x in (output.detach(), *torch.autograd.grad(output, leaves, direction))]


def alike(exact: list[Tensor], ours: list[Tensor]) -> None:
    for a, b in zip(exact, ours, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def operator_inputs(gates: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 200, 3, size, generator=generator) for _ in range(3))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    rounded = [x.bfloat16().float() for x in (q, k, v)]
    return rounded + [-torch.rand(2, 200, 3, generator=generator), torch.rand(2, 200, 3, generator=generator)][:gates]


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("gates", [0, 1], ids=["no decay", "decay"])
def test_the_kernels_of_linear_attention(size: int, gates: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None = None) -> Tensor:
        return linear_attention.chunked(q, k, v, log_g)[0]

    inputs = operator_inputs(gates, size)
    assert linear_attention.kernels_for(inputs[0].cuda(), inputs[2].cuda().bfloat16()) is not None
    alike(gradients(run, inputs, "cpu", torch.float32), gradients(run, inputs, "cuda", torch.bfloat16))


@pytest.mark.parametrize("size", [64, 128])
def test_the_gated_delta_rule_with_and_without_its_kernel(size: int) -> None:
    def plain(*inputs: Tensor) -> Tensor:
        return delta_rule.chunked_in_torch(*inputs, None, 64)[0]

    inputs = operator_inputs(2, size)
    exact = gradients(plain, inputs, "cpu", torch.float32)
    alike(exact, gradients(plain, inputs, "cuda", torch.float32))
    alike(exact, gradients(lambda *x: delta_rule.chunked(*x)[0], inputs, "cuda", torch.bfloat16))


@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_kernels_of_the_gated_delta_rule(size: int) -> None:
    """Ours, also where flash-linear-attention is installed; with a state before the sequence and one after it."""
    from models.language import delta_rule_kernels

    *inputs, log_g, beta = operator_inputs(2, size)
    state = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)) / size**0.5

    def run(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def both(q: Tensor, k: Tensor, v: Tensor, s: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
            o, last = form(q, k, v, log_g, beta, s.float(), 64)
            return torch.cat([o.float().flatten(), last.flatten()])

        return both

    leaves = [*inputs, state.bfloat16().float(), log_g, beta]
    exact = gradients(run(delta_rule.chunked_in_torch), leaves, "cpu", torch.float32)
    alike(exact, gradients(run(delta_rule_kernels.chunked), leaves, "cuda", torch.bfloat16))


@pytest.mark.parametrize("pattern", [Sliding(20), Strided(7), Strided(200), Fixed(8, 3), Fixed(64, 8)], ids=str)
def test_sparse_patterns_through_flex_attention(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(LENGTHS), heads, 32, generator=generator) for heads in (4, 2, 2)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packing = Packing.of(LENGTHS, q.device)
        if not q.is_cuda:
            return packed_attention(q, k, v, packing, pattern)
        return interval_attention(q, k, v, pattern.parts(packing))

    exact = gradients(run, inputs, "cpu", torch.float32)
    alike(exact, gradients(run, inputs, "cuda", torch.float32))
