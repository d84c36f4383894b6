"""Time and memory of every attention kind against length: training (forward and backward) and decoding.

python -m benchmarks.attention_scaling                                        # GPU, bfloat16, 1k to 64k tokens
python -m benchmarks.attention_scaling --device cpu --lengths 256 512 --hidden-size 64 --heads 2 --head-dim 32
python -m benchmarks.attention_scaling --plot-only                            # the newest entry of the JSON file as PNG

A layer is the whole mixer with its projections (gated_attention_unit: with its MLP, which is the same thing). The
peer is full_attention, which is FlashAttention on a GPU. Operators alone are timed beside flash-linear-attention's
kernels where that package is installed. The file is rewritten after each measurement, so a run may be cut short.
"""

import dataclasses
import functools
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
from torch.nn.functional import normalize, scaled_dot_product_attention

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
        for length in config.lengths:  # all kinds at one length first: a run that is cut short compares the kinds
            for kind in config.kinds:
                if figures.out_of_time():
                    print(f"no time left for {kind} at {length}")
                    continue
                training(figures, kind, length)
                decoding(figures, kind, length)
            if not figures.out_of_time():
                operators(figures, length)
    plot(json.loads(config.output.read_text())[-1], config.plot)


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


def operators(figures: Figures, length: int) -> None:
    """Forward and backward of the mixing alone, beside flash-linear-attention's kernels of the same operators."""
    config = figures.config
    shape = (1, length, config.heads, config.head_dim)
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    generator = torch.Generator(config.device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=config.device, dtype=dtype) for _ in range(3))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    log_g = -torch.rand(shape[:3], generator=generator, device=config.device) / 10
    beta = torch.rand(shape[:3], generator=generator, device=config.device)

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)

    def undecayed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention.chunked(q, k, v, None)

    def delta_in_torch(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule.chunked_in_torch(q, k, v, log_g, beta, None, linear_attention.CHUNK)

    cases: list[tuple[dict[str, Any], str, Callable[..., Any], list[Tensor]]] = [
        (figures.ours, "linear_attention", linear_attention.chunked, [q, k, v, log_g]),
        (figures.ours, "linear_attention without decay", undecayed, [q, k, v]),
        (figures.ours, "gated_delta_rule", delta_rule.chunked, [q, k, v, log_g, beta]),
        (figures.ours, "gated_delta_rule in plain torch", delta_in_torch, [q, k, v, log_g, beta]),
    ]
    if config.device == "cuda" or length <= 4096:
        cases.append((figures.peer, "SDPA", softmax, [q, k, v]))
    if config.device == "cuda":
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            from fla.ops.simple_gla import chunk_simple_gla
        except ImportError:
            print("flash-linear-attention is not installed: no figures of its kernels")
        else:
            simple = functools.partial(chunk_simple_gla, scale=1.0)
            delta = functools.partial(chunk_gated_delta_rule, scale=1.0)
            cases.append((figures.peer, "linear_attention", simple, [q, k, v, log_g]))
            cases.append((figures.peer, "linear_attention without decay", simple, [q, k, v]))
            cases.append((figures.peer, "gated_delta_rule", delta, [q, k, v, log_g, beta]))
    for side, name, operator, inputs in cases:
        if figures.out_of_time():  # fla's kernels take minutes to tune themselves at first
            print(f"no time left for the operator {name} at {length}")
            continue
        leaves = [x.detach().requires_grad_() for x in inputs]
        direction = torch.randn_like(v)

        def step(operator: Callable[..., Any] = operator, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(operator(*leaves)[0], leaves, direction)  # noqa: B023  (used before the next turn)

        milliseconds, _ = measure(step, config)
        figures.add(side["operator_ms"], name, length, milliseconds)


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
