"""Time and memory of every attention kind against length: training (forward and backward) and decoding.

python -m benchmarks.attention_scaling                                        # GPU, bfloat16, 1k to 64k tokens
python -m benchmarks.attention_scaling --device cpu --lengths 256 512 --hidden-size 64 --heads 2 --head-dim 32
python -m benchmarks.attention_scaling --operators-only --fla-processes 14    # the operators, beside fla's kernels
python -m benchmarks.attention_scaling --plot-only                            # the newest entry with layers as PNG

A layer is the whole mixer with its projections (gated_attention_unit: with its MLP, which is the same thing). The
peer is full_attention, which is FlashAttention on a GPU. Operators alone are timed beside flash-linear-attention's
kernels where that package is installed, one operator at all lengths after another; its kernels are tuned once each
(fla_kernels.py). The file is rewritten after each measurement, so a run may be cut short.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import fla_kernels
from benchmarks.fla_kernels import operator_inputs
from benchmarks.record import write_result
from models.language import delta_rule, linear_attention
from models.language.cache import KeyValueCache, StateCache
from models.language.config import MIXER_KINDS, LanguageConfig
from models.language.mixers import MIXERS
from models.language.packing import Packing
from models.language.rope import inverse_frequencies, rotation


@dataclasses.dataclass
class Config:
    device: str = "cuda"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    kinds: tuple[str, ...] = MIXER_KINDS
    hidden_size: int = 1024
    heads: int = 16
    head_dim: int = 64
    decode_batch: int = 8
    seconds: float = 0.1  # for each figure, after one call to warm up
    budget_s: float = 150.0  # start no measurement after this
    operators_only: bool = False
    fla_processes: int = 0  # compile flash-linear-attention's kernels in so many processes first
    output: Path = Path("benchmarks/results/attention_scaling.json")
    plot: Path = Path("docs/images/attention_scaling.png")
    plot_only: bool = False


class Figures:
    """Kind → length → figures, on disk after each new one."""

    def __init__(self, config: Config) -> None:
        self.config, self.begin = config, time.monotonic()
        self.before = config.output.read_text() if config.output.exists() else None
        self.ours: dict[str, Any] = {"training_ms": {}, "training_gib": {}, "decoding_ms": {}, "operator_ms": {}}
        self.peer: dict[str, Any] = {"operator_ms": {}}

    def add(self, table: dict[str, Any], name: str, length: int, value: float | str) -> None:
        table.setdefault(name, {})[str(length)] = round(value, 4) if isinstance(value, float) else value
        print(f"{time.monotonic() - self.begin:6.1f} s  {name:34s} {length:6d}  {value}", flush=True)
        if self.before is None:
            self.config.output.unlink(missing_ok=True)
        else:
            self.config.output.write_text(self.before)
        write_result(self.config.output, "attention_scaling", self.ours, self.peer, ratios(self.ours, self.peer))

    def out_of_time(self) -> bool:
        return time.monotonic() - self.begin > self.config.budget_s


def main(config: Config) -> None:
    if not config.plot_only:
        figures = Figures(config)
        if not config.operators_only:
            layers(figures)
        operators(figures)
    if config.plot_only or not config.operators_only:
        entries = json.loads(config.output.read_text())
        plot([entry for entry in entries if entry["ours"]["training_ms"]][-1], config.plot)


def layers(figures: Figures) -> None:
    for length in figures.config.lengths:  # all kinds at one length first: a run that is cut short compares the kinds
        for kind in figures.config.kinds:
            if figures.out_of_time():
                print(f"no time left for {kind} at {length}")
                continue
            training(figures, kind, length)
            decoding(figures, kind, length)


def training(figures: Figures, kind: str, length: int) -> None:
    config = figures.config
    layer, x_TD, packing, cos_sin = a_layer(config, kind, 1, length)
    direction = torch.randn_like(x_TD)

    def step() -> None:
        layer.zero_grad()
        layer(x_TD.requires_grad_(), packing, cos_sin, None).backward(direction)

    milliseconds, gib = measure(step, config)
    figures.add(figures.ours["training_ms"], kind, length, milliseconds)
    if gib is not None:
        figures.add(figures.ours["training_gib"], kind, length, gib)


@torch.inference_mode()
def decoding(figures: Figures, kind: str, length: int) -> None:
    """One token of each of `decode_batch` sequences that have read `length` tokens already."""
    config = figures.config
    layer, x_TD, packing, cos_sin = a_layer(config, kind, config.decode_batch, 1, start=length)
    cache = layer.empty_cache(config.decode_batch, length + 1)
    filled = [cache.keys, cache.values] if isinstance(cache, KeyValueCache) else [cache.state]
    assert isinstance(cache, (KeyValueCache, StateCache))
    for tensor in filled:
        tensor.uniform_(0.1, 0.2)
    milliseconds, _ = measure(lambda: layer(x_TD, packing, cos_sin, cache), config)
    figures.add(figures.ours["decoding_ms"], kind, length, milliseconds)


def a_layer(
    config: Config, kind: str, batch: int, length: int, start: int = 0
) -> tuple[Any, Tensor, Packing, tuple[Tensor, Tensor]]:
    """A layer with random weights, and `batch` sequences of `length` tokens."""
    language = LanguageConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.head_dim,
        intermediate_size=2 * config.hidden_size,  # of the gated attention unit, as in its paper
        sliding_window=256,
        sparse_stride=128,
    )
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    layer: nn.Module = MIXERS[kind](language)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0)
    layer.to(config.device, dtype)
    packing = Packing.of([length] * batch, config.device, [start] * batch)
    x_TD = torch.randn(batch * length, config.hidden_size, device=config.device, dtype=dtype)
    frequency = inverse_frequencies(language.rope, language.head_dim).to(config.device)
    return layer, x_TD, packing, rotation(frequency, packing.positions_T, dtype)


def operators(figures: Figures) -> None:
    """Forward and backward of the mixing alone, beside flash-linear-attention's kernels of the same operators."""
    config = figures.config
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    for side, name, operator in operators_of_both_sides(figures):
        tuned = config.device == "cpu" or side is figures.ours or name == "SDPA"
        for length in config.lengths:
            if figures.out_of_time():
                print(f"no time left for the operator {name} at {length}")
                break
            if name == "SDPA" and config.device == "cpu" and length > 4096:
                break
            if not tuned:  # at a length that fills the GPU; the others follow it
                middle = sorted(config.lengths)[len(config.lengths) // 2]
                measure(a_step(operator, inputs_of(config, name, middle, dtype)), config)
                tuned = True
            milliseconds, _ = measure(a_step(operator, inputs_of(config, name, length, dtype)), config)
            figures.add(side["operator_ms"], name, length, milliseconds)


def operators_of_both_sides(figures: Figures) -> list[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """(ours or the peer's, name, operator), those of one kind beside each other."""
    config = figures.config

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    def undecayed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention.chunked(q, k, v, None)

    def delta_in_torch(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule.chunked_in_torch(q, k, v, log_g, beta, None, linear_attention.CHUNK)

    ours: dict[str, Callable[..., Any]] = {
        "linear_attention": linear_attention.chunked,
        "linear_attention without decay": undecayed,
        "gated_delta_rule": delta_rule.chunked,
        "gated_delta_rule in plain torch": delta_in_torch,
    }
    theirs: dict[str, Callable[..., Any]] = {}
    if config.device == "cuda":
        try:
            theirs = fla_kernels.fla_operators()
        except ImportError:
            print("flash-linear-attention is not installed: no figures of its kernels")
        else:
            if config.fla_processes:
                fla_kernels.compile_in_parallel(config.heads, config.head_dim, config.fla_processes)
            fla_kernels.tune_quickly()
    sides: list[tuple[dict[str, Any], str, Callable[..., Any]]] = [(figures.peer, "SDPA", softmax)]
    for name, operator in ours.items():
        sides.append((figures.ours, name, operator))
        if name in theirs:
            sides.append((figures.peer, name, theirs[name]))
    return sides


def inputs_of(config: Config, name: str, length: int, dtype: torch.dtype) -> list[Tensor]:
    return operator_inputs(name, length, config.heads, config.head_dim, config.device, dtype)


def a_step(operator: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], None]:
    leaves = [x.requires_grad_() for x in inputs]
    direction = torch.randn_like(leaves[2])

    def step() -> None:
        torch.autograd.grad(operator(*leaves)[0], leaves, direction)

    return step


def measure(step: Callable[[], Any], config: Config) -> tuple[float | str, float | None]:
    """Median milliseconds of a call, and the most memory that it took beyond what was held, in GiB (GPU only)."""
    gpu = config.device == "cuda"
    try:
        step()
        if gpu:
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        begin = time.perf_counter()
        while not times or time.perf_counter() - begin < config.seconds:
            start = time.perf_counter()
            step()
            if gpu:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        gib = (torch.cuda.max_memory_allocated() - held) / 2**30 if gpu else None
        return median(times), gib
    except torch.cuda.OutOfMemoryError:
        return "out of memory", None
    except Exception as error:  # noqa: BLE001  (one kind that fails must not cost the figures of the others)
        return f"{type(error).__name__}: {str(error)[:200]}", None


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """crossover: from which length on a kind trains, and decodes, faster than full attention. growth: the exponent of
    its training time between the two longest lengths, 1 for linear. over_fla: our operator's time over fla's."""
    result: dict[str, Any] = {"crossover_training": {}, "crossover_decoding": {}, "growth": {}, "over_fla": {}}
    for table, name in (("training_ms", "crossover_training"), ("decoding_ms", "crossover_decoding")):
        full = numbers(ours[table].get("full_attention", {}))
        for kind in ours[table]:
            times = {n: t for n, t in numbers(ours[table][kind]).items() if n in full}
            slower = [n for n, t in times.items() if t >= full[n]]
            later = [n for n in times if n > max(slower, default=0)]
            if kind != "full_attention":
                result[name][kind] = min(later, default=None)
    for kind, figures in ours["training_ms"].items():
        (n0, t0), (n1, t1) = [(0, 0.0), (0, 0.0), *sorted(numbers(figures).items())][-2:]
        if n0:
            result["growth"][kind] = round(math.log(t1 / t0) / math.log(n1 / n0), 2)
    for name, figures in ours["operator_ms"].items():
        theirs = numbers(peer["operator_ms"].get(name, {}))
        result["over_fla"][name] = {n: round(t / theirs[n], 2) for n, t in numbers(figures).items() if n in theirs}
    return result


def numbers(figures: dict[str, Any]) -> dict[int, float]:
    return {int(length): value for length, value in figures.items() if isinstance(value, float)}


def plot(entry: dict[str, Any], file: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: run again with --plot-only where it is")
        return
    panels = [("training_ms", "forward + backward, ms"), ("training_gib", "memory, GiB"), ("decoding_ms", "a step, ms")]
    panels = [(table, title) for table, title in panels if entry["ours"][table]]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False)
    for axis, (table, title) in zip(axes[0], panels, strict=True):
        for kind, figures in entry["ours"][table].items():
            points = sorted(numbers(figures).items())
            style = {"color": "black", "linewidth": 2.5} if kind == "full_attention" else {"marker": "."}
            axis.plot([n for n, _ in points], [t for _, t in points], label=kind, **style)
        axis.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(entry["machine"], fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
