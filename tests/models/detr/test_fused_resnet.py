"""The fused ResNet against the plain one, and its Triton kernel against plain torch."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import library

from models.detr.fused_resnet import fuse, pointwise
from tests.models.detr.small import resnet_with_statistics

SHAPES = [(2, 5, 7, 16, 32), (1, 12, 16, 96, 16), (3, 4, 4, 64, 160)]  # B, H, W, K, N


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_a_fused_resnet_computes_the_same(kind: str) -> None:
    resnet, images = resnet_with_statistics(kind), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = resnet(images)
        fuse(resnet)
        after = resnet(images)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in resnet.parameters())


def test_the_operator_is_what_a_compiler_is_told_it_is() -> None:
    x, weight = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last), torch.randn(32, 16)
    residual = torch.randn(2, 32, 5, 7).contiguous(memory_format=torch.channels_last)
    library.opcheck(pointwise, (x, weight, torch.randn(32), torch.randn(16), residual))


def differences() -> list[float]:
    """Between kernel and plain torch, with and without what may be left out."""
    from models.detr import pointwise_kernels

    del pointwise_kernels._pointwise.configs[1:]  # the interpreter has no clock to choose by
    generator = torch.Generator().manual_seed(0)
    worst = []
    for (batch, rows, columns, inputs, outputs), parts in itertools.product(
        SHAPES, itertools.product((0, 1), repeat=2)
    ):
        x = torch.randn(batch, inputs, rows, columns, generator=generator)
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        bias = torch.randn(outputs, generator=generator)
        before, residual = (
            torch.randn(shape, generator=generator) if part else None
            for shape, part in zip(((inputs,), (batch, outputs, rows, columns)), parts, strict=True)
        )
        arguments = (x, weight, bias, before, residual)
        worst.append((pointwise_kernels.pointwise(*arguments) - pointwise(*arguments)).abs().max().item())
    return worst


def test_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.detr.test_fused_resnet"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    worst = [float(number) for number in done.stdout.split()]
    assert len(worst) == 4 * len(SHAPES)
    assert max(worst) <= 1e-5


@pytest.mark.gpu
def test_kernel_on_the_gpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 256, 50, 67, device="cuda").contiguous(memory_format=torch.channels_last)
    weight, bias, before = (torch.randn(shape, device="cuda") / 16 for shape in ((64, 256), (64,), (256,)))
    residual = torch.randn(2, 64, 50, 67, device="cuda").contiguous(memory_format=torch.channels_last)
    exact = pointwise(*(t.double().cpu() for t in (x, weight, bias, before, residual)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = pointwise(*(t.to(dtype) for t in (x, weight, bias, before, residual)))
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double().cpu(), exact, atol=tolerance, rtol=tolerance)


if __name__ == "__main__":
    print(*differences())
