"""How much of the machine's matrix peak a mixture of experts reaches, forward and backward, in bfloat16.

python -m benchmarks.moe_tflops                          on a GPU: about two minutes
python -m benchmarks.moe_tflops --device cpu --toy       the same code at toy size

Useful operations only: three products of 2·D·I operations for each of the T·K chosen rows, times three with the
backward pass. `products` are the grouped products alone, `experts` has the activation between them, `layer` is all of
it: router, sorting, rows to their experts and back. `dense` is a SwiGLU layer of the same active parameters (inner size
K·I), `loop` goes from expert to expert. `parts_ms` says where the layer's time goes.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor

from benchmarks.record import end_in_order, write_result
from models.language.config import LanguageConfig
from models.language.dispatch import Dispatch
from models.language.experts import GroupedLinear, grouped_swiglu, looped_swiglu, weighted_swiglu
from models.language.mlp import DenseMLP
from models.language.moe import MixtureOfExperts


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    experts: int
    top_k: int
    inner: int
    tokens: tuple[int, ...]

    def operations(self, tokens: int) -> float:
        return 3 * 3 * 2 * tokens * self.top_k * self.hidden * self.inner


SHAPES = (
    Shape("qwen3-30b-a3b", 2048, 128, 8, 768, (16_384, 32_768, 65_536)),
    Shape("quickstart-gpu", 512, 16, 4, 320, (16_384, 65_536)),
)
TOY = (Shape("toy", 64, 8, 2, 32, (256,)),)


@dataclasses.dataclass
class Config:
    device: str = "cuda"
    toy: bool = False
    seconds: float = 0.3  # of measurement for each figure, after the warm-up
    output: Path = Path("benchmarks/results/moe_tflops.json")


def main(config: Config) -> None:
    end_in_order()
    torch.manual_seed(0)
    timer = Timer(config.device, config.seconds)
    side = 256 if config.toy else 8192
    a, b = (torch.randn(side, side, device=config.device, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * side**3 / timer(lambda: a @ b) / 1e12
    print(f"matrix peak ({side}³): {peak:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, object]] = []
    try:
        for shape in TOY if config.toy else SHAPES:
            torch.compiler.reset()  # a job has one shape too
            for tokens in shape.tokens:
                rows.append(measure(shape, tokens, timer, peak))
                print(rows[-1], flush=True)
    finally:
        write_result(config.output, "moe_tflops", {"matrix_peak_tflops": round(peak, 1), "rows": rows})


class Timer:
    """Median seconds of a call, warmed up (and compiled) first."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        times: list[float] = []
        while sum(times) < self.seconds or len(times) < 5:
            self._wait()
            begin = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - begin)
        return median(times)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def trained(self, forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> float:
        """Of a forward and backward pass; the gradient that comes in is not counted."""
        grad = torch.randn_like(forward())
        return self(lambda: torch.autograd.grad(forward(), inputs, grad))


def measure(shape: Shape, tokens: int, timer: Timer, peak: float) -> dict[str, object]:
    device = timer.device
    moe = MixtureOfExperts(
        LanguageConfig(
            hidden_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.inner,
        ).validate()
    )
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moe.to(device, torch.bfloat16)
    x_TD = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    record, weights_TK = moe.gate(x_TD)
    dispatch = Dispatch.of(record.experts_TK, shape.experts)
    ends_E = dispatch.ends_E
    x_SD = dispatch.spread(x_TD).detach().requires_grad_()
    weights_S = dispatch.take(weights_TK).detach().requires_grad_()
    w13, w2 = moe.experts.gate_up_proj, moe.experts.down_proj
    gate_up = torch.randn(len(x_SD), 2 * shape.inner, device=device, dtype=torch.bfloat16, requires_grad=True)
    inner = torch.randn(len(x_SD), shape.inner, device=device, dtype=torch.bfloat16, requires_grad=True)

    parts = {
        "router": timer.trained(lambda: moe.gate(x_TD)[1], [x_TD, moe.gate.weight]),
        "sort": timer(lambda: Dispatch.of(record.experts_TK, shape.experts)),
        "rows_out": timer.trained(lambda: dispatch.spread(x_TD), [x_TD]),
        "rows_back": timer.trained(lambda: dispatch.collect(x_SD), [x_SD]),
        "activation": timer.trained(lambda: weighted_swiglu(gate_up, weights_S), [gate_up, weights_S]),
        "gate_up": timer.trained(lambda: GroupedLinear.apply(x_SD, w13, ends_E), [x_SD, w13]),
        "down": timer.trained(lambda: GroupedLinear.apply(inner, w2, ends_E), [inner, w2]),
    }
    rows = [x_SD, weights_S, w13, w2]
    experts = timer.trained(lambda: grouped_swiglu(x_SD, weights_S, ends_E, w13, w2), rows)
    loop = timer.trained(lambda: looped_swiglu(x_SD, weights_S, ends_E, w13, w2), rows)
    layer = timer.trained(lambda: moe(x_TD, None), [x_TD, *moe.parameters()])
    mlp = DenseMLP(shape.hidden, shape.top_k * shape.inner).to(device, torch.bfloat16)
    dense = timer.trained(lambda: mlp(x_TD), [x_TD, *mlp.parameters()])

    seconds = {
        "products": parts["gate_up"] + parts["down"], "experts": experts, "layer": layer, "dense": dense, "loop": loop
    }  # fmt: skip
    tflops = {name: shape.operations(tokens) / value / 1e12 for name, value in seconds.items()}
    return {
        "shape": shape.name,
        "tokens": tokens,
        "busiest_over_mean": round((ends_E.diff().max() * shape.experts / len(x_SD)).item(), 2),
        "tflops": {name: round(value, 3 if value < 1 else 1) for name, value in tflops.items()},
        "share_of_peak": {name: round(value / peak, 3) for name, value in tflops.items()},
        "layer_ms": round(1e3 * layer, 3),
        "parts_ms": {name: round(1e3 * value, 3) for name, value in parts.items()},
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
