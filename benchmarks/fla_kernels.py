"""flash-linear-attention's operators for the benchmarks, and their tuning made short.

    python -m benchmarks.fla_kernels --part 0 --parts 14      # what `compile_in_parallel` starts

Each of its kernels is compiled and timed in up to 48 configurations at its first call (for each set of head count,
widths, dtypes and gates; the length is not among the keys), one after another: a minute and a half for an operator.
Most of that is the compiler. So processes that share Triton's cache on disk compile a part of the configurations each,
and whoever times them afterwards finds them there. Triton is imported where it is needed: plain torch for the CPU comes
without it.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from triton.runtime.autotuner import Autotuner

LIMIT_S = 150.0  # for all parts; what is not compiled by then is compiled when it is timed


@dataclass
class Part:
    part: int
    parts: int
    heads: int = 16
    head_dim: int = 64


def fla_operators() -> dict[str, Callable[..., Any]]:
    """By our names; arguments as in models/language. Raises ImportError if the package is not installed."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    return {
        "linear_attention": functools.partial(chunk_simple_gla, scale=1.0),
        "linear_attention without decay": functools.partial(chunk_simple_gla, scale=1.0),
        "gated_delta_rule": functools.partial(chunk_gated_delta_rule, scale=1.0),
    }


def operator_inputs(name: str, length: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k [1, L, H, C] of length 1, v, and the gates that the operator takes, log_g and beta [1, L, H] float32."""
    shape = (1, length, heads, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    q, k, v = (x.to(dtype) for x in (normalize(q, dim=-1), normalize(k, dim=-1), v))
    log_g = -torch.rand(shape[:3], generator=generator, device=device) / 10
    beta = torch.rand(shape[:3], generator=generator, device=device)
    gates = {"linear_attention": 1, "gated_delta_rule": 2}.get(name.partition(" in ")[0], 0)
    return [q, k, v, *[log_g, beta][:gates]]


def tuners() -> Iterator[tuple[str, "Autotuner"]]:
    """Each kernel of the package that is tuned, with its name."""
    from triton.runtime import KernelInterface
    from triton.runtime.autotuner import Autotuner

    seen = set()
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.")]:
        for value in list(vars(module).values()):
            while isinstance(value, KernelInterface):
                if isinstance(value, Autotuner) and id(value) not in seen:
                    seen.add(id(value))
                    yield value.base_fn.__name__, value
                value = getattr(value, "fn", None)


def tune_quickly() -> None:
    """Time each configuration for 25 ms in the place of 125."""
    from triton.testing import do_bench

    for _, tuner in tuners():
        tuner.do_bench = functools.partial(do_bench, warmup=5, rep=20)


def compile_in_parallel(heads: int, head_dim: int, processes: int) -> None:
    """Fill the cache on disk for `fla_operators` in bfloat16. A process that fails is told of and costs its part."""
    begin = time.perf_counter()
    sizes = ["--parts", str(processes), "--heads", str(heads), "--head-dim", str(head_dim)]
    command = [sys.executable, "-m", "benchmarks.fla_kernels", *sizes]
    children = [
        subprocess.Popen([*command, "--part", str(part)], env=os.environ | {"FLA_CACHE_RESULTS": "0"})
        for part in range(processes)
    ]
    failed = [part for part, child in enumerate(children) if _failed(child, LIMIT_S - (time.perf_counter() - begin))]
    print(
        f"fla's kernels compiled in {time.perf_counter() - begin:.0f} s; failed parts: {failed or 'none'}", flush=True
    )


def _failed(child: "subprocess.Popen[bytes]", seconds: float) -> bool:
    try:
        return child.wait(max(0.0, seconds)) != 0
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return True


def compile_part(part: Part) -> None:
    operators = fla_operators()
    for _, tuner in tuners():
        tuner.configs = tuner.configs[part.part :: part.parts] or tuner.configs[:1]
        tuner.do_bench = _run_once
    for name, operator in operators.items():
        inputs = operator_inputs(name, 256, part.heads, part.head_dim, "cuda", torch.bfloat16)
        leaves = [x.requires_grad_() for x in inputs]
        o = operator(*leaves)[0]
        torch.autograd.grad(o, leaves, torch.randn_like(o))
    torch.cuda.synchronize()


def _run_once(call: Callable[[], Any], quantiles: tuple[float, ...] = (), **_: Any) -> list[float]:
    call()
    return [1.0] * len(quantiles)


if __name__ == "__main__":
    compile_part(tyro.cli(Part))
