"""The Triton kernels of the gated delta rule against the plain chunked form."""

from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from models.language import delta_rule
from tests.models.language.kernels import check_in_the_interpreter, differences

# length, F, C, chunk: one chunk, several, a partial last one; v read in one block of channels and in two
CASES = [(16, 16, 16, 16), (70, 16, 32, 16), (150, 32, 64, 64)]


def compare(length: int, features: int, channels: int, chunk: int) -> list[float]:
    """Of the output, the last state, and the gradients of q, k, v, log_g, beta and the first state."""
    from models.language import delta_rule_kernels

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, width, generator=generator) for width in (features, features, channels))
    log_g = -3 * torch.rand(2, length, 2, generator=generator) ** 4
    beta = torch.rand(2, length, 2, generator=generator)
    state = torch.randn(2, 2, features, channels, generator=generator)
    return differences(
        partial(delta_rule_kernels.chunked, chunk=chunk),
        partial(delta_rule.chunked_in_torch, chunk=chunk),
        [normalize(q, dim=-1), normalize(k, dim=-1), v, log_g, beta, state],
    )


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    check_in_the_interpreter("tests.models.language.test_delta_rule_kernels", [6] * len(CASES))


if __name__ == "__main__":
    for case in CASES:
        print(*compare(*case))
