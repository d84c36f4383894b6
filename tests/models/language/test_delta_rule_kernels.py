"""The Triton kernels of the gated delta rule in Triton's interpreter, against the plain chunked form; as in
test_linear_attention_kernels.py."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

from models.language import delta_rule

# length, F, C, chunk: one chunk, several, a partial last one; v read in one block of channels and in two
CASES = [(16, 16, 16, 16), (70, 16, 32, 16), (150, 32, 64, 64)]


def differences(length: int, features: int, channels: int, chunk: int) -> list[float]:
    """Of the output, the last state, and the gradients of q, k, v, log_g, beta and the first state."""
    from models.language import delta_rule_kernels

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, width, generator=generator) for width in (features, features, channels))
    log_g = -3 * torch.rand(2, length, 2, generator=generator) ** 4
    beta = torch.rand(2, length, 2, generator=generator)
    state = torch.randn(2, 2, features, channels, generator=generator)
    inputs = [normalize(q, dim=-1), normalize(k, dim=-1), v, log_g, beta, state]
    results = []
    for chunked in (delta_rule_kernels.chunked, delta_rule.chunked_in_torch):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = chunked(*leaves, chunk)
        generator = torch.Generator().manual_seed(1)
        total = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    return [(ours - plain).abs().max().item() for ours, plain in zip(*results, strict=True)]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.language.test_delta_rule_kernels"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES)
    for line in lines:
        output, last, *gradients = map(float, line.split())
        assert len(gradients) == 6
        assert max(output, last) <= 1e-5
        assert max(gradients) <= 1e-4


if __name__ == "__main__":
    for case in CASES:
        print(*differences(*case))
