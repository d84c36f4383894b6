"""The Triton kernels of linear attention against the plain chunked form."""

import pytest
import torch
from torch import Tensor

from models.language import linear_attention
from tests.models.language.kernels import Operator, check_in_the_interpreter, differences

# length, F, C, with decay, chunk: one chunk, several, a partial last one, more than a scan reads at once; v read in one
# block of channels and in two
CASES = [
    (16, 16, 16, True, 16),
    (70, 16, 32, True, 16),
    (70, 16, 16, False, 16),
    (70, 32, 128, True, 64),
    (300, 16, 16, True, 16),
    (256, 16, 16, False, 16),
]


def compare(length: int, features: int, channels: int, with_decay: bool, chunk: int) -> list[float]:
    """Of the output, the last state, and the gradients of q, k, v, the first state and log_g."""
    from models.language import linear_attention_kernels

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, width, generator=generator) for width in (features, features, channels))
    state = torch.randn(2, 2, features, channels, generator=generator)
    inputs = [q / features**0.5, k / features**0.5, v, state]
    if with_decay:
        inputs.append(-3 * torch.rand(2, length, 2, generator=generator) ** 4)

    def reordered(chunked: Operator) -> Operator:
        def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_g: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return chunked(q, k, v, log_g, state, chunk)

        return call

    return differences(reordered(linear_attention_kernels.chunked), reordered(linear_attention.chunked), inputs)


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    gradients = [5 if with_decay else 4 for _, _, _, with_decay, _ in CASES]
    check_in_the_interpreter("tests.models.language.test_linear_attention_kernels", gradients)


if __name__ == "__main__":
    for case in CASES:
        print(*compare(*case))
