"""The measurements and pictures of docs/initialisation.md: attention's temperature, width, and norm placement.

python -m benchmarks.initialisation            (about 5 minutes on one core)
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.record import write_result
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.inspection import attention_entropy, inspect_model
from models.language.packing import Packing
from models.language.parametrisation import learning_rate_multipliers
from models.language.rope import inverse_frequencies, rotation
from models.seeding import derive_seed

VOCABULARY = 64
Part = Literal["temperature", "width", "transfer", "placement", "warmup"]


@dataclass
class Config:
    parts: tuple[Part, ...] = ("temperature", "width", "transfer", "placement", "warmup")
    images: Path = Path("docs/images")
    output: Path = Path("benchmarks/results/initialisation.json")
    seeds: int = 3
    scale: float = 1.0  # of the numbers of training steps; below 1 for a trial


def main(config: Config) -> None:
    torch.set_num_threads(1)
    config.images.mkdir(parents=True, exist_ok=True)
    parts = {
        "temperature": temperature, "width": width, "transfer": transfer, "placement": placement, "warmup": warmup
    }  # fmt: skip
    for name in config.parts:
        figures = parts[name](config)
        print(name, figures)
        write_result(config.output, f"initialisation: {name}", figures)


def shape(**changes: Any) -> LanguageConfig:
    base = LanguageConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, intermediate_size=128, initializer="lecun", tie_word_embeddings=False,
    )  # fmt: skip
    return replace(base, **changes)


def text(sequences: int, length: int, seed: int) -> tuple[Tensor, Packing]:
    """Sequences to learn from: a chain whose transitions are fixed, the second half a copy of the first."""
    likely = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (sequences, 1), generator=generator)
    for _ in range(length // 2 - 1):
        choice = torch.randint(0, 4, (sequences,), generator=generator)
        tokens = torch.cat([tokens, likely[tokens[:, -1], choice][:, None]], 1)
    return torch.cat([tokens, tokens], 1).flatten(), Packing.of([length] * sequences)


def train(config: LanguageConfig, lr: float, steps: int, seed: int, warm: int = 0) -> list[float]:
    """Losses of each step of Adam at a constant rate, after a linear warm-up of `warm` steps."""
    model = Decoder(config).init_weights(derive_seed(seed, "weights"))
    factors = learning_rate_multipliers(model)
    named = dict(model.named_parameters())
    adam = torch.optim.Adam([{"params": [p], "factor": factors.get(name, 1.0)} for name, p in named.items()])
    losses = []
    for step in range(steps):
        tokens_T, packing = text(8, 48, derive_seed(seed, "batch", step))
        logits_BLV = model.logits(model(tokens_T, packing)).view(8, 48, -1)
        loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_T.view(8, 48)[:, 1:].flatten())
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses + [math.nan] * (steps - len(losses))
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = lr * group["factor"] * min(1.0, (step + 1) / max(warm, 1))
        adam.step()
    return losses


def end(losses: list[float]) -> float:
    """Mean of the last tenth."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def temperature(config: Config) -> dict[str, Any]:
    """Attention at initialisation for inputs of unit variance, as the heads get wider."""
    sizes = (8, 16, 32, 64, 128, 256)
    kinds = {
        "q·k/√d, lecun": {"initializer": "lecun"},
        "q·k, lecun": {"initializer": "lecun", "attention_scaling": "none"},
        "q·k, T5's smaller q": {"initializer": "t5", "attention_scaling": "none"},
        "q·k/d, lecun": {"initializer": "lecun", "attention_scaling": "inverse"},
    }
    length = 256
    x_TD = torch.randn(length, 512, generator=torch.Generator().manual_seed(1))
    packing = Packing.of([length])
    found: dict[str, dict[str, list[float]]] = {}
    for label, changes in kinds.items():
        rows: dict[str, list[float]] = {"logit_std": [], "entropy": [], "softmax_jacobian": []}
        for size in sizes:
            shaped = shape(hidden_size=512, head_dim=size, qk_norm=False, num_hidden_layers=1, **changes)
            attention = Decoder(shaped).init_weights(0).layers[0].self_attn
            cos_sin = rotation(inverse_frequencies(shaped.rope, size), packing.positions_T, torch.float32)
            q, k, _ = attention.project(x_TD, packing, cos_sin)
            scores = torch.einsum("ihc,jhc->hij", q, k) / math.sqrt(size)
            rows["logit_std"].append(scores.std().item())
            rows["entropy"].append(attention_entropy(attention, x_TD, packing, cos_sin))
            # trace of ∂p/∂logits = diag(p) − p pᵀ for the last query: the gradient that softmax lets through
            rows["softmax_jacobian"].append(1 - scores[:, -1].softmax(-1).square().sum(-1).mean().item())
        found[label] = {name: [round(value, 4) for value in values] for name, values in rows.items()}
    panels = (("logit_std", "σ of the logits", "log"), ("entropy", "entropy / log n", "linear"),
              ("softmax_jacobian", "tr ∂p/∂logits: 0 is saturated", "linear"))  # fmt: skip
    _plot(
        config.images / "attention-temperature.png",
        [(title, "head_dim", scale, {k: (sizes, v[name]) for k, v in found.items()}) for name, title, scale in panels],
        log_x=True,
    )
    return {"head_dim": sizes, **found}


def width(config: Config) -> dict[str, Any]:
    """The coordinate check: what three steps of Adam add to the last layer's output."""
    widths = (64, 128, 256, 512, 1024)
    found: dict[str, Any] = {"width": widths}
    for name in ("standard", "ntk", "mup"):
        moved = []
        for hidden in widths:
            changes = [_moved(_wide(hidden, name), seed) for seed in range(config.seeds)]
            moved.append(sum(changes) / len(changes))
        slope = math.log2(moved[-1] / moved[0]) / math.log2(widths[-1] / widths[0])
        found[name] = {"moved": [round(m, 4) for m in moved], "exponent_of_width": round(slope, 3)}
    lines = {
        f"{n}: width^{found[n]['exponent_of_width']:.2f}": (widths, found[n]["moved"]) for n in found if n != "width"
    }
    _plot(
        config.images / "coordinate-check.png",
        [("RMS of what 3 steps add to the last layer's output", "hidden_size", "log", lines)],
        log_x=True,
    )
    return found


def _wide(hidden: int, parametrization: str) -> LanguageConfig:
    return shape(
        hidden_size=hidden, num_attention_heads=hidden // 16, num_key_value_heads=hidden // 16,
        intermediate_size=2 * hidden, parametrization=parametrization, base_hidden_size=64,
    )  # fmt: skip


def _moved(config: LanguageConfig, seed: int) -> float:
    model = Decoder(config).init_weights(seed)
    factors = learning_rate_multipliers(model)
    named = dict(model.named_parameters())
    adam = torch.optim.Adam([{"params": [p], "lr": 1e-4 * factors.get(name, 1.0)} for name, p in named.items()])
    tokens_T, packing = text(2, 48, seed)
    outputs: list[Tensor] = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    for _ in range(4):
        loss = F.cross_entropy(model.logits(model(tokens_T, packing))[:-1], tokens_T[1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (outputs[-1] - outputs[0]).square().mean().sqrt().item()


def transfer(config: Config) -> dict[str, Any]:
    """Loss after a short training over learning rates and widths: does the best rate stay where it is?"""
    rates = [2.0**exponent for exponent in range(-11, -3)]
    widths = (64, 128, 256)
    steps = max(2, int(80 * config.scale))
    found: dict[str, Any] = {"lr": rates, "steps": steps}
    panels = []
    for name in ("standard", "mup"):
        found[name] = {}
        for hidden in widths:
            found[name][hidden] = [round(end(train(_wide(hidden, name), lr, steps, 0)), 4) for lr in rates]
            best = rates[min(range(len(rates)), key=lambda i: found[name][hidden][i])]
            print(f"  {name} width {hidden}: best rate {best:g}, losses {found[name][hidden]}", flush=True)
            found[name][f"best at {hidden}"] = best
        lines = {f"width {hidden}": (rates, found[name][hidden]) for hidden in widths}
        panels.append((f"{name}: loss after {steps} steps", "learning rate", "linear", lines))
    _plot(config.images / "rate-transfer.png", panels, log_x=True, share_y=True)
    return found


PLACEMENTS: dict[str, dict[str, Any]] = {
    "pre": {"norm_placement": "pre", "initializer": "xavier"},
    "post": {"norm_placement": "post", "initializer": "xavier"},
    "deepnorm": {"norm_placement": "deepnorm", "initializer": "deepnorm"},
    "gates (ReZero)": {"norm_placement": "none", "initializer": "xavier"},
}


def placement(config: Config) -> dict[str, Any]:
    """Signal, gradient and the effect of one step of Adam in 16 layers at initialisation."""
    found = {}
    tokens_T, packing = text(8, 48, 0)
    for label, changes in PLACEMENTS.items():
        found[label] = inspect_model(
            Decoder(shape(num_hidden_layers=16, **changes)).init_weights(0), tokens_T, packing, lr=1e-3
        ).layers
    panels = []
    for name, title in (("stream", "RMS of the stream"), ("weight_gradient", "norm of the weights' gradient"),
                        ("moved", "what one step changes / output")):  # fmt: skip
        lines = {label: (range(16), [getattr(f, name) for f in layers]) for label, layers in found.items()}
        panels.append((title, "layer", "log", lines))
    _plot(config.images / "norm-placement.png", panels)
    return {
        label: {
            name: [float(f"{getattr(layers[i], name):.4g}") for i in (0, 7, 15)]
            for name in ("stream", "gradient", "weight_gradient", "moved")
        }
        for label, layers in found.items()
    } | {"layers_shown": [0, 7, 15]}


def warmup(config: Config) -> dict[str, Any]:
    """Training 12 layers with and without a linear warm-up, at one rate."""
    steps, lr = max(4, int(200 * config.scale)), 3e-3
    runs = {
        "post, no warm-up": (PLACEMENTS["post"], 0),
        "post, warm-up": (PLACEMENTS["post"], steps // 3),
        "pre, no warm-up": (PLACEMENTS["pre"], 0),
        "deepnorm, no warm-up": (PLACEMENTS["deepnorm"], 0),
        "gates, no warm-up": (PLACEMENTS["gates (ReZero)"], 0),
    }
    found: dict[str, Any] = {"lr": lr, "steps": steps}
    lines = {}
    for label, (changes, warm) in runs.items():
        curves = [train(shape(num_hidden_layers=12, **changes), lr, steps, seed, warm) for seed in range(config.seeds)]
        found[label] = [round(end(curve), 4) for curve in curves]
        print(f"  {label}: {found[label]}", flush=True)
        mean = [sum(values) / len(values) for values in zip(*curves)]
        lines[label] = (range(steps), _smooth(mean))
    _plot(
        config.images / "warm-up.png", [(f"loss, mean of {config.seeds} seeds, rate {lr:g}", "step", "linear", lines)]
    )
    return found


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _plot(
    file: Path, panels: list[tuple[str, str, str, dict[str, Any]]], log_x: bool = False, share_y: bool = False
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * max(len(panels), 1.5), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=share_y)[0]
    for axis, (title, x_label, y_scale, lines) in zip(axes, panels):
        for label, (x, y) in lines.items():
            axis.plot(list(x), y, marker="." if len(x) < 40 else "", label=label)
        axis.set(title=title, xlabel=x_label, yscale=y_scale)
        if log_x:
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    if share_y:
        axes[0].set_ylim(None, math.log(VOCABULARY) + 0.3)
    figure.savefig(file, dpi=80)


if __name__ == "__main__":
    main(tyro.cli(Config))
