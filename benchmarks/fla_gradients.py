"""Are flash-linear-attention's gradients right on this GPU? Outputs and gradients of its operators, and of ours,
against our plain form in float32.

    python -m benchmarks.fla_gradients                  # GPU; two minutes, most of them its compiler's
    python -m benchmarks.fla_gradients --device cpu     # ours alone, to see that it runs

Triton 3.4 to 3.7.0 compiles one of its kernels to wrong code on Hopper GPUs (its issue 640): `chunk_bwd_kernel_dqkwg`,
which both operators use, where it reads 64 channels at once. Which configuration runs is the tuner's choice, so each
one is run by itself here, with the package's own tiles and with tiles of 32 channels; so are those of
`prepare_wy_repr_bwd_kernel`, whose sibling in the ungated rule was wrong too (issue 984). A configuration counts as
right if no tensor is off by more than 2% in bfloat16, as in tests/models/language/test_attention_cuda.py. In float32
the first configuration is run.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor

from benchmarks import fla_kernels
from benchmarks.fla_kernels import operator_inputs
from benchmarks.record import write_result
from models.language import delta_rule, linear_attention

TENSORS = ("o", "dq", "dk", "dv", "dlog_g", "dbeta")
LIMITS = {"bfloat16": 0.02, "float32": 0.005}  # float32 products of its kernels are TF32
VARIED = ("chunk_bwd_kernel_dqkwg", "prepare_wy_repr_bwd_kernel")


@dataclasses.dataclass
class Config:
    device: str = "cuda"
    length: int = 1000
    heads: int = 4
    head_dims: tuple[int, ...] = (64,)
    output: Path = Path("benchmarks/results/fla_gradients.json")


def main(config: Config) -> None:
    figures: dict[str, Any] = {"ours": {}, "peer": {}, "right": {}}
    before = config.output.read_text() if config.output.exists() else None

    def add(side: str, label: str, dtype: str, errors: list[float]) -> None:
        named = {name: round(error, 5) for name, error in zip(TENSORS, errors)}
        figures[side][label] = named
        figures["right"][f"{side}: {label}"] = right = max(errors, default=1.0) <= LIMITS[dtype]
        print(f"{'right' if right else 'WRONG':6s} {side:5s} {label}: {named}", flush=True)
        config.output.unlink(missing_ok=True)
        if before is not None:
            config.output.write_text(before)
        write_result(config.output, "fla_gradients", figures["ours"], figures["peer"], figures["right"])

    ours: dict[str, Callable[..., Any]] = {
        "linear_attention": linear_attention.chunked,
        "linear_attention without decay": lambda q, k, v: linear_attention.chunked(q, k, v, None),
        "gated_delta_rule": delta_rule.chunked,
    }
    theirs = fla_kernels.fla_operators() if config.device == "cuda" else {}
    for size in config.head_dims:
        for name, operator in ours.items():
            for dtype in ("bfloat16", "float32"):
                exact, inputs = reference(name, size, dtype, config)
                add("ours", f"{name}, {size} channels, {dtype}", dtype, errors(operator, inputs, exact))
                if name in theirs:
                    for variant in itertools.islice(variants(name), None if dtype == "bfloat16" else 1):
                        label = f"{name}, {size} channels, {dtype}, {variant}"
                        add("peer", label, dtype, errors(theirs[name], inputs, exact))


def reference(name: str, size: int, dtype: str, config: Config) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the plain form in float32, and the inputs, rounded to the dtype."""
    inputs = operator_inputs(name, config.length, config.heads, size, config.device, getattr(torch, dtype))

    def plain(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[Tensor, Tensor]:
        if len(gates) == 2:
            return delta_rule.chunked_in_torch(q, k, v, *gates, None, linear_attention.CHUNK)
        return linear_attention.parallel(q, k, v, gates[0] if gates else None)

    return gradients(plain, [x.float() for x in inputs]), inputs


def gradients(operator: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = operator(*leaves)[0]
    generator = torch.Generator(o.device).manual_seed(1)
    direction = torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, direction)]


def errors(operator: Callable[..., Any], inputs: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative error of each tensor in the Euclidean norm; none if the operator raises."""
    try:
        found = gradients(operator, inputs)
    except Exception as error:  # noqa: BLE001  (what a kernel refuses is a finding; the others shall still be run)
        print(f"{type(error).__name__}: {str(error)[:200]}")
        return []
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def variants(name: str) -> Iterator[str]:
    """One configuration after another of the kernels in question, one alone of every other kernel; described."""
    where = ("fla.ops.common.chunk_o", "fla.ops.gated_delta_rule.wy_fast")
    varied = {n: t for n, t in fla_kernels.tuners() if n in VARIED and t.base_fn.__module__ in where}
    if name != "gated_delta_rule":
        del varied["prepare_wy_repr_bwd_kernel"]
    with restored():
        for _, tuner in fla_kernels.tuners():
            tuner.configs = tuner.configs[:1]
        for tiles in ("tiles as they are", "tiles of 32"):
            for kernel, tuner in varied.items():
                first, everything = tuner.configs, ALL[id(tuner)]
                for choice in everything:
                    tuner.configs = [choice]
                    with small_tiles(tiles == "tiles of 32"):
                        yield f"{tiles}, {kernel} {choice.num_warps} warps {choice.num_stages} stages"
                tuner.configs = first


ALL: dict[int, list[Any]] = {}  # configurations of each tuner


@contextmanager
def restored() -> Iterator[None]:
    ALL.update({id(tuner): tuner.configs for _, tuner in fla_kernels.tuners() if id(tuner) not in ALL})
    try:
        yield
    finally:
        for _, tuner in fla_kernels.tuners():
            tuner.configs = ALL[id(tuner)]


@contextmanager
def small_tiles(small: bool) -> Iterator[None]:
    """Let the two kernels' callers believe that there is little shared memory."""
    if not small:
        yield
        return
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import wy_fast

    with (
        mock.patch.object(chunk_o, "check_shared_mem", return_value=False),
        mock.patch.object(wy_fast, "check_shared_mem", return_value=False),
    ):
        yield


if __name__ == "__main__":
    main(tyro.cli(Config))
