"""1×1 convolutions of channels-last images with everything around them in one Triton kernel: inference on a GPU.

    y = relu(relu(x + before) Wᵀ + bias + residual)

A ResNet's 1×1 convolutions move memory more than they compute; biases, shortcuts and ReLUs in kernels of their own read
and write every feature map once more. M pixels of all images, K channels in, N channels out.
"""

# mypy: disallow-untyped-defs=False
import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = [(128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4)]
CONFIGS = [triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=w, num_stages=s) for m, n, k, w, s in TILES]


@triton.autotune(CONFIGS, key=["N", "K", "IEEE"])
@triton.jit
def _pointwise(
    x, weight, bias, before, residual, y, M, N: tl.constexpr, K: tl.constexpr, IEEE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share the rows of x: it is read from memory once and from the cache after that.
    columns = tl.cdiv(N, BN)
    m = (tl.program_id(0) // columns).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    rows, within = m[:, None] < M, n[None, :] < N
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=rows & (k[None, :] < K), other=0.0)
        if before is not None:
            a = tl.maximum(a + tl.load(before + k, mask=k < K, other=0.0)[None, :], 0.0).to(x.dtype.element_ty)
        b = tl.load(weight + n[None, :] * K + k[:, None], mask=within & (k[:, None] < K), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee" if IEEE else "tf32")
    total += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    at = m[:, None] * N + n[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=rows & within, other=0.0)
    tl.store(y + at, tl.maximum(total, 0.0).to(y.dtype.element_ty), mask=rows & within)


def pointwise(
    x_BKHW: Tensor, weight_NK: Tensor, bias_N: Tensor, before_K: Tensor | None, residual_BNHW: Tensor | None
) -> Tensor:  # fmt: skip
    """(B, N, H, W), channels last. x and residual lie channels last too; no gradients."""
    x_BHWK = x_BKHW.permute(0, 2, 3, 1).contiguous()
    residual_BHWN = None if residual_BNHW is None else residual_BNHW.permute(0, 2, 3, 1).contiguous()
    outputs, inputs = weight_NK.shape
    pixels = x_BHWK.numel() // inputs
    y_BHWN = x_BHWK.new_empty((*x_BHWK.shape[:3], outputs))
    _pointwise[lambda tile: (triton.cdiv(pixels, tile["BM"]) * triton.cdiv(outputs, tile["BN"]),)](
        x_BHWK, weight_NK, bias_N, before_K, residual_BHWN, y_BHWN, pixels, outputs, inputs,
        x_BHWK.dtype == torch.float32,
    )  # fmt: skip
    return y_BHWN.permute(0, 3, 1, 2)
