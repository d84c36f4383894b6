"""Loss curves of small byte-level language models that differ in their attention, or in having experts, only.

python -m benchmarks.language_curves                                                      # GPU, about four minutes
python -m benchmarks.language_curves --device cpu --hidden-size 64 --layers 2 --steps 8 --length 128 --sequences 2
python -m benchmarks.language_curves --plot-only                                          # the newest entry as PNG

The text is the Python standard library's own source code, which is on every machine (about 25 MB); every 50th file is
held out. Every model reads the same bytes in the same order with the same optimizer and schedule, and has the same
number of active parameters: the MLP is made as wide as the mixer leaves room for. Gated attention units have no MLP; as
in their paper two of them stand for one layer of the others. The file is rewritten after each model.
"""

import dataclasses
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.record import write_result
from llm_rl.optimizer import MasterAdamW
from models.language.balancing import load_balancing_loss
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.kernel_attention import redraw_features
from models.language.mixers import MIXERS
from models.language.packing import Packing
from models.language.router import RouterTrace
from models.seeding import derive_seed

BYTES = 256
MODELS = {  # name: (kinds of the layers, repeated; mixture of experts)
    "full_attention": (("full_attention",), False),
    "linear_attention": (("linear_attention",), False),
    "gated_delta_rule": (("gated_delta_rule",), False),
    "elu_attention": (("elu_attention",), False),
    "gated_attention_unit": (("gated_attention_unit",), False),
    "full_attention, MoE": (("full_attention",), True),
    "linear_attention, MoE": (("linear_attention",), True),
    "performer_attention": (("performer_attention",), False),
    "efficient_attention": (("efficient_attention",), False),
    "sliding_attention": (("sliding_attention",), False),
    "3 linear_attention to 1 full_attention": (("linear_attention",) * 3 + ("full_attention",), False),
    "strided_attention": (("strided_attention",), False),
}


@dataclasses.dataclass
class Config:
    device: str = "cuda"
    models: tuple[str, ...] = tuple(MODELS)
    hidden_size: int = 512
    layers: int = 8
    head_dim: int = 64
    length: int = 2048
    sequences: int = 16  # in a batch
    steps: int = 400
    lr: float = 1e-3
    warmup: int = 40
    redraw_every: int = 100  # steps between new random features of Performer layers
    seed: int = 0
    budget_s: float = 270.0  # start no model after this
    output: Path = Path("benchmarks/results/language_curves.json")
    plot: Path = Path("docs/images/language_curves.png")
    plot_only: bool = False


def main(config: Config) -> None:
    if not config.plot_only:
        begin, ours = time.monotonic(), dict[str, Any]()
        before = config.output.read_text() if config.output.exists() else None
        training, heldout = text()
        for name in config.models:
            if time.monotonic() - begin > config.budget_s:
                print(f"no time left for {name}")
                continue
            ours[name] = train(name, config, training, heldout)
            print(
                f"{time.monotonic() - begin:6.1f} s  {name:40s} {json.dumps(ours[name] | {'curve': '...'})}", flush=True
            )
            if before is None:
                config.output.unlink(missing_ok=True)
            else:
                config.output.write_text(before)
            write_result(config.output, "language_curves", ours)
    plot(json.loads(config.output.read_text())[-1], config.plot)


def text() -> tuple[Tensor, Tensor]:
    """The standard library's source code as bytes, without tests' generated tables; and the held-out files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    parts = ([f.read_bytes() for i, f in enumerate(files) if (i % 50 == 0) == held] for held in (False, True))
    training, heldout = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return training, heldout


def shape(name: str, config: Config) -> LanguageConfig:
    """The model's shape: its active parameters are those of full attention with an MLP of three times the width."""
    kinds, mixture = MODELS[name]
    heads = config.hidden_size // config.head_dim
    alone = kinds == ("gated_attention_unit",)
    layers = config.layers * 2 if alone else config.layers
    base = LanguageConfig(
        vocab_size=BYTES,
        hidden_size=config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.head_dim,
        layer_types=tuple(kinds[i % len(kinds)] for i in range(layers)),
        intermediate_size=1,
        sliding_window=256,
        sparse_stride=128,
        gau_chunk_size=256,
        max_position_embeddings=config.length,
        initializer_range=config.hidden_size**-0.5,
    )
    wanted = config.layers * (4 * config.hidden_size * heads * config.head_dim + 9 * config.hidden_size**2)
    mixing = sum(mixer_parameters(base, kind) for kind in base.layer_types)
    width = (wanted - mixing) // (3 * config.hidden_size * layers) // 16 * 16
    if not mixture:
        return dataclasses.replace(base, intermediate_size=int(width))
    return dataclasses.replace(base, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=int(width) // 2)


def mixer_parameters(base: LanguageConfig, kind: str) -> int:
    """Of one layer; of a gated attention unit what does not grow with its width (which is 1 in `base`)."""
    with torch.device("meta"):
        mixer = MIXERS[kind](base)
    return sum(p.numel() for p in mixer.parameters() if p.requires_grad)


def active_parameters(model: Decoder) -> int:
    """Of the layers, for one token."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.requires_grad:
            routed = ".experts." in name
            total += (
                parameter.numel() * config.num_experts_per_tok // config.num_experts if routed else parameter.numel()
            )
    return total


def train(name: str, config: Config, training: Tensor, heldout: Tensor) -> dict[str, Any]:
    dtype = torch.float32 if config.device == "cpu" else torch.bfloat16
    model = Decoder(shape(name, config)).init_weights(config.seed).to(config.device, dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = MasterAdamW(named, (0.9, 0.95), weight_decay=0.1)
    packing = Packing.of([config.length] * config.sequences, config.device)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "bytes"))
    curve: list[tuple[int, float]] = []
    recent: list[Tensor] = []
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for step in range(config.steps):
        if step and step % config.redraw_every == 0:
            redraw_features(model, derive_seed(config.seed, "features", step))
        tokens, targets = batch(training, config, generator)
        trace = RouterTrace()
        loss = cross_entropy(model, tokens, targets, packing, trace)
        (loss + (0.01 * load_balancing_loss(trace.records) if trace.records else 0.0)).backward()
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(config.lr * min((step + 1) / config.warmup, 1.0, (config.steps - step) / (0.3 * config.steps)))
        recent.append(loss.detach())
        if (step + 1) % max(1, config.steps // 40) == 0:
            curve.append((step + 1, round(torch.stack(recent).mean().item(), 4)))
            recent = []
    seconds = time.perf_counter() - begin
    tokens_read = config.steps * config.length * config.sequences
    return {
        "curve": curve,
        "heldout_bits_per_byte": round(evaluate(model, config, heldout) / math.log(2), 4),
        "active_parameters": active_parameters(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens_read,
        "tokens_per_s": round(tokens_read / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if config.device == "cuda" else None,
    }


def batch(data: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(0, len(data) - config.length - 1, (config.sequences,), generator=generator)
    rows = data[starts[:, None] + torch.arange(config.length + 1)].long().to(config.device)
    return rows[:, :-1].flatten(), rows[:, 1:].flatten()


def cross_entropy(
    model: Decoder, tokens: Tensor, targets: Tensor, packing: Packing, trace: RouterTrace | None = None
) -> Tensor:
    return F.cross_entropy(model.logits(model(tokens, packing, trace=trace)).float(), targets)


@torch.no_grad()
def evaluate(model: Decoder, config: Config, heldout: Tensor) -> float:
    """Mean loss over 8 batches of held-out text, the same for every model."""
    packing = Packing.of([config.length] * config.sequences, config.device)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "held out"))
    losses = [cross_entropy(model, *batch(heldout, config, generator), packing).item() for _ in range(8)]
    return sum(losses) / len(losses)


def plot(entry: dict[str, Any], file: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: run again with --plot-only where it is")
        return
    figure, axis = pyplot.subplots(figsize=(9, 6))
    for name, result in sorted(entry["ours"].items(), key=lambda item: item[1]["heldout_bits_per_byte"]):
        steps, losses = zip(*result["curve"], strict=True)
        label = f"{name}: {result['heldout_bits_per_byte']:.3f} held out"
        bits = [loss / math.log(2) for loss in losses]
        axis.plot(steps, bits, label=label, linestyle="--" if "MoE" in name else "-")
    axis.set(xlabel="step", ylabel="training loss, bits per byte", yscale="log", title=entry["machine"])
    axis.title.set_fontsize(8)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
