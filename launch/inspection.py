"""`longstride inspect`: signals, gradients and effective learning rates of a language model, as table and picture."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from launch.config import RECIPES, apply_entries, combine, read_recipe
from launch.console import RunConsole
from launch.jobs import JOBS
from models.errors import UserError, unknown_name
from models.language.checkpoint import load_pretrained, read_config
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.inspection import Inspection, inspect_model
from models.language.packing import Packing

LANGUAGE_JOBS = ("reason", "sft")


@dataclass(frozen=True)
class InspectOptions:
    """Flags of `longstride inspect CONFIG`; CONFIG is a language recipe (file or name) or a model folder."""

    depth: int = 0
    """Layers instead of the config's; its kinds of layer are repeated."""
    width: int = 0
    """hidden_size instead of the config's; heads and MLPs grow alike, head_dim stays."""
    set: tuple[str, ...] = ()
    """Fields of the model's config.json to change, as FIELD=VALUE."""
    vary: str = ""
    """FIELD=VALUE,VALUE,...: one model for each value, side by side. FIELD may also be depth, width or lr."""
    batch: Path | None = None
    """Text to read, for a folder with a tokenizer; without it, random tokens."""
    sequences: int = 4
    length: int = 128
    """Tokens of each sequence."""
    lr: float = 1e-3
    """Rate of the one step of Adam."""
    seed: int = 0
    png: Path = Path("inspect.png")
    """Where the picture goes."""

    def __post_init__(self) -> None:
        for name in ("sequences", "length"):
            if getattr(self, name) < 1 + (name == "length"):
                raise UserError(f"inspect: {name} is {getattr(self, name)}; use at least {1 + (name == 'length')}")
        if self.lr <= 0:
            raise UserError(f"inspect: lr is {self.lr}; it must be positive")


@dataclass(frozen=True)
class Variant:
    """One model to look at."""

    label: str
    depth: int
    width: int
    lr: float
    changes: dict[str, Any] = field(default_factory=dict)


def run(target: str, options: InspectOptions) -> int:
    """Print a table for each variant and write the picture. Raises UserError for what cannot be inspected."""
    pyplot = _pyplot()
    folder = Path(target) if Path(target).is_dir() else None
    base = read_config(folder) if folder else _of_recipe(target)
    inspections = {}
    for variant in _variants(options):
        model = _model(base, folder, variant, options.seed)
        tokens_T = _tokens(folder, model.config.vocab_size, options)
        lengths = [options.length] * (len(tokens_T) // options.length)
        inspections[variant.label] = inspect_model(model, tokens_T, Packing.of(lengths), variant.lr)
        _print(variant.label, inspections[variant.label])
    _plot(pyplot, target, inspections, options.png)
    print(f"picture: {options.png}")
    return 0


def _of_recipe(name: str) -> LanguageConfig:
    """The policy that a language recipe makes from scratch."""
    from llm_rl.policy_folder import language_config

    if not Path(name).is_file() and not (RECIPES / f"{name}.yaml").is_file():
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise UserError(f"inspect {name}: neither a model folder nor a recipe; recipes are {', '.join(known)}")
    entries = read_recipe(name, None)
    if entries.get("job", LANGUAGE_JOBS[0]) not in LANGUAGE_JOBS:
        raise UserError(f"inspect {name}: a recipe for the job {entries['job']}, which trains no language model")
    combined = combine("Inspect", job=JOBS[LANGUAGE_JOBS[0]].config_class())
    policy = {"policy": entries["policy"]} if "policy" in entries else {}
    config = apply_entries(combined, policy, f"recipe {name}").job.policy
    return language_config(config, config.vocab_size)


def _variants(options: InspectOptions) -> list[Variant]:
    changes = dict(_assignment(text) for text in options.set)
    plain = Variant("", options.depth, options.width, options.lr, changes)
    if not options.vary:
        return [plain]
    name, _, values = options.vary.partition("=")
    if not values:
        raise UserError(f"inspect: --vary {options.vary}: write FIELD=VALUE,VALUE,...")
    variants = []
    for text in values.split(","):
        label = f"{name}={text}"
        if name in ("depth", "width", "lr"):
            variants.append(dataclasses.replace(plain, label=label, **{name: _positive(name, text)}))
        else:
            variants.append(dataclasses.replace(plain, label=label, changes=changes | {name: _value(name, text)}))
    return variants


def _positive(name: str, text: str) -> Any:
    number: Any = float if name == "lr" else int
    try:
        if 0 < (value := number(text)) < math.inf:
            return value
    except ValueError:
        pass
    kind = "number" if name == "lr" else "whole number"
    raise UserError(f"inspect: --vary {name}: {text!r} is no positive {kind}")


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"inspect: --set {text}: write FIELD=VALUE")
    return name, _value(name, value)


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"inspect: {name}={text}: write the value as YAML has it") from None


def _model(base: LanguageConfig, folder: Path | None, variant: Variant, seed: int) -> Decoder:
    """The folder's weights if its config is left as it is, fresh ones otherwise."""
    if folder and not variant.changes and not variant.depth and not variant.width and any(folder.glob("*.safetensors")):
        return load_pretrained(folder)
    return Decoder(_changed(base, variant)).init_weights(seed)


def _changed(config: LanguageConfig, variant: Variant) -> LanguageConfig:
    if variant.depth:
        kinds = [config.mixer_kind(i % config.num_hidden_layers) for i in range(variant.depth)]
        dense = [i for i in range(variant.depth) if i % config.num_hidden_layers in config.mlp_only_layers]
        config = dataclasses.replace(
            config, num_hidden_layers=variant.depth, layer_types=tuple(kinds), mlp_only_layers=tuple(dense)
        )
    if variant.width:
        config = _widened(config, variant.width)
    known = {f.name for f in dataclasses.fields(LanguageConfig)}
    for name, value in variant.changes.items():
        if name not in known:
            raise unknown_name("field of the model's config", name, known)
        if isinstance(value, list):
            value = tuple(value)
        kind = type(getattr(config, name))
        accepted: Any = (kind, int, float) if kind in (float, type(None)) else kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"inspect: {name} is {value!r}; it must be of type {kind.__name__}")
        config = dataclasses.replace(config, **{name: value})
    return config.validate()


GROWING = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size",
)  # fmt: skip


def _widened(config: LanguageConfig, width: int) -> LanguageConfig:
    sizes = {name: getattr(config, name) for name in GROWING}
    step = config.hidden_size // math.gcd(config.hidden_size, *sizes.values())
    if width % step:
        raise UserError(f"inspect: width {width} does not divide into heads and MLPs; use a multiple of {step}")
    grown = {name: size * width // config.hidden_size for name, size in sizes.items()}
    return dataclasses.replace(config, hidden_size=width, **grown)


def _tokens(folder: Path | None, vocab_size: int, options: InspectOptions) -> torch.Tensor:
    if options.batch is None:
        generator = torch.Generator().manual_seed(options.seed)
        return torch.randint(0, vocab_size, (options.sequences * options.length,), generator=generator)
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise UserError("inspect: --batch needs a model folder with a tokenizer.json; leave it out for random tokens")
    from tokenizers import Tokenizer

    try:
        text = options.batch.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"inspect: --batch {options.batch}: cannot be read ({error})") from None
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    count = min(options.sequences, len(tokens) // options.length)
    if count < 1:
        raise UserError(
            f"inspect: --batch {options.batch} has {len(tokens)} tokens, fewer than one sequence; lower --length"
        )
    return torch.tensor(tokens[: count * options.length])


COLUMNS = ("layer", "stream", "mixer", "MLP", "gradient", "ΔW/W", "moved", "entropy")


def _print(label: str, inspection: Inspection) -> None:
    rows = [["embed", f"{inspection.embedding:.2g}", *[""] * 6]]
    for i, layer in enumerate(inspection.layers):
        figures = (
            layer.stream, layer.attention, layer.mlp, layer.gradient, layer.rate, layer.moved, layer.entropy
        )  # fmt: skip
        kind = layer.mixer.removesuffix("_attention")
        rows.append([f"{i} {kind}", *("" if f is None else f"{f:.2g}" for f in figures)])
    title = (
        f"{label + ': ' if label else ''}{inspection.parameters / 1e6:.3g}M parameters, loss {inspection.loss:.3f}, "
        f"σ of the logits {inspection.logits:.2g}"
    )
    RunConsole("inspect").table(title, list(COLUMNS), rows)


PANELS = (
    ("stream", "RMS of the residual stream", "log"),
    ("gradient", "RMS of its gradient × tokens", "log"),
    ("weight_gradient", "norm of the weights' gradient", "log"),
    ("rate", "‖ΔW‖ / ‖W‖ of one Adam step", "log"),
    ("moved", "what that step changes / output", "log"),
    ("entropy", "attention entropy / log n", "linear"),
)


def _plot(pyplot: Any, title: str, inspections: dict[str, Inspection], file: Path) -> None:
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.3), layout="constrained")
    for axis, (name, text, scale) in zip(axes.flat, PANELS, strict=True):
        for label, inspection in inspections.items():
            points = [(i, getattr(layer, name)) for i, layer in enumerate(inspection.layers)]
            points = [(i, y) for i, y in points if y is not None and (y > 0 or scale == "linear")]
            axis.plot([i for i, _ in points], [y for _, y in points], marker=".", label=label)
        axis.set(title=text, xlabel="layer", yscale=scale)
        low, high = axis.get_ylim()
        if scale == "log" and high < 10 * low:  # a line that hardly moves should look like one
            axis.set_ylim(low / 3, high * 3)
        axis.grid(alpha=0.3)
    if any(inspections):  # a single model has no label
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=80)
    except (OSError, ValueError) as error:  # ValueError: a file type that matplotlib does not write
        raise UserError(f"inspect: cannot write {file} ({error}); choose another --png") from None
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("inspect draws with matplotlib: pip install 'longstride[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
