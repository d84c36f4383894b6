"""The Triton kernels in Triton's interpreter, so that they are checked without a GPU: same outputs and gradients as the
plain chunked form. The interpreter is chosen when triton is imported, so it gets a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from models.language import linear_attention

# length, F, C, with decay, chunk: one chunk, several, a partial last one; v read in one block of channels and in two
CASES = [(16, 16, 16, True, 16), (70, 16, 32, True, 16), (70, 16, 16, False, 16), (70, 32, 128, True, 64)]


def differences(length: int, features: int, channels: int, with_decay: bool, chunk: int) -> list[float]:
    """Of the output, the last state, and the gradients of q, k, v, the first state and log_g."""
    from models.language import linear_attention_kernels

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, width, generator=generator) for width in (features, features, channels))
    state = torch.randn(2, 2, features, channels, generator=generator)
    inputs = [q / features**0.5, k / features**0.5, v, state]
    if with_decay:
        inputs.append(-3 * torch.rand(2, length, 2, generator=generator) ** 4)
    results = []
    for chunked in (linear_attention_kernels.chunked, linear_attention.chunked):
        q, k, v, state, *decay = leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = chunked(q, k, v, decay[0] if decay else None, state, chunk)
        generator = torch.Generator().manual_seed(1)
        total = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    return [(ours - plain).abs().max().item() for ours, plain in zip(*results, strict=True)]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.language.test_linear_attention_kernels"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES)
    for case, line in zip(CASES, lines, strict=True):
        output, last, *gradients = map(float, line.split())
        assert len(gradients) == (5 if case[3] else 4)
        assert max(output, last) <= 1e-5
        assert max(gradients) <= 1e-4


if __name__ == "__main__":
    for case in CASES:
        print(*differences(*case))
