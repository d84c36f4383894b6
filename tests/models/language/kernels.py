"""A pair of implementations of one operator, the Triton kernels in Triton's interpreter and the plain form: so the
kernels are checked without a GPU. The interpreter is chosen when triton is imported, so it gets a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operator = Callable[..., tuple[Tensor, Tensor]]


def differences(kernels: Operator, plain: Operator, inputs: Sequence[Tensor]) -> list[float]:
    """The largest of the output, of the last state, and of the gradient of each input."""
    results = []
    for operator in (kernels, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = operator(*leaves)
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(o.shape, generator=generator) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, directions)])
    return [(ours - theirs).abs().max().item() for ours, theirs in zip(*results, strict=True)]


def check_in_the_interpreter(module: str, gradients: Sequence[int]) -> None:
    """Run the module, which prints the differences of each of its cases; gradients: how many each case has."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line, count in zip(done.stdout.splitlines(), gradients, strict=True):
        output, last, *of_gradients = map(float, line.split())
        assert len(of_gradients) == count
        assert max(output, last) <= 1e-5
        assert max(of_gradients) <= 1e-4
