"""Hugging Face model folders in and out: config.json and safetensors, nothing unpickled."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import UserError
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.families import FAMILIES
from models.language.lora import merged_weights

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def read_config(folder: str | Path) -> LanguageConfig:
    """Raises UserError if the folder or its config.json is missing, broken, or of a model we cannot run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give the path of a downloaded Hugging Face model")
    return LanguageConfig.from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def load_pretrained(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Read a folder of any of families.FAMILIES, in evaluation mode. Raises UserError for anything missing, broken or
    misfit."""
    config = read_config(folder)
    with torch.device("meta"):  # no memory and no initialisation for weights that are about to be read
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    load_checkpoint_tensors(model, read_tensors(folder), str(folder))
    return model.eval()


def read_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's safetensors files, one at a time."""
    for file in _weight_files(Path(folder)):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


@torch.no_grad()
def load_checkpoint_tensors(model: Decoder, named: Iterable[tuple[str, Tensor]], source: str = "checkpoint") -> None:
    """Copy tensors under their checkpoint names into the model.

    Raises UserError naming the first missing, unexpected or mis-shaped tensor.
    """
    family = FAMILIES[model.config.model_type]
    slots = {family.tensor_name(name): weight for name, weight in checkpoint_slots(model).items()}
    waiting = set(slots)
    for name, tensor in named:
        if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue  # older folders carry both, although they follow from the rest
        if family.next_token_layers and _layer(name) >= model.config.num_hidden_layers:
            continue  # predicts a further token, for speculative decoding
        if name not in slots:
            raise UserError(f"{source}: unexpected tensor {name}; does config.json describe this model?")
        if slots[name].shape != tensor.shape:
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}, but config.json asks for {list(slots[name].shape)}"
            )
        slots[name].copy_(tensor)
        waiting.discard(name)
    if waiting:
        raise UserError(
            f"{source}: tensor {min(waiting)} is missing ({len(waiting)} in all); does config.json describe this model?"
        )


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, -1 for one of no layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def checkpoint_slots(model: Decoder) -> dict[str, Tensor]:
    """Views into the model's weights and its routers' biases, by the names and in the pieces of a Qwen3-MoE checkpoint
    (one piece per expert)."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return dict(piece for name, weight in named if ".adapters." not in name for piece in _pieces(name, weight.detach()))


def _pieces(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = name if name.startswith("lm_head.") else f"model.{name}"
    experts, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        for e, both in enumerate(weight):
            gate, up = both.chunk(2)
            yield f"{experts}.{e}.gate_proj.weight", gate
            yield f"{experts}.{e}.up_proj.weight", up
    elif part == "down_proj":
        for e, down in enumerate(weight):
            yield f"{experts}.{e}.down_proj.weight", down
    else:
        yield name, weight


def to_checkpoint(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names of the model's family, the active adapter merged in. The model is left as it is; the
    tensors may be views of it."""
    family = FAMILIES[model.config.model_type]
    for name, weight in merged_weights(model):
        for piece, tensor in _pieces(name, weight):
            yield family.tensor_name(piece), tensor


def save_pretrained(model: Decoder, folder: str | Path, tokenizer_files_from: str | Path | None = None) -> None:
    """Write a model folder that transformers and vLLM load (for new layer kinds: vLLM with our plugin).

    Every file appears whole or not at all. Raises UserError if the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = list(_shards(to_checkpoint(model)))
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
            (folder / INDEX).unlink(missing_ok=True)  # of a larger model saved here before
        else:
            weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
            size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        for name, shard in zip(names, shards):
            # Cloned one shard at a time: pieces of one stacked tensor share its storage, which safetensors refuses.
            whole = {key: tensor.detach().cpu().clone() for key, tensor in shard.items()}
            write_tensors(folder / name, whole)
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        write_json(folder / "config.json", {**model.config.to_hf(), "dtype": dtype})
        for file in TOKENIZER_FILES if tokenizer_files_from is not None else ():
            source = Path(tokenizer_files_from or "") / file
            if source.is_file() and source.resolve() != (folder / file).resolve():
                shutil.copyfile(source, folder / file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the model ({error}); free some space or choose another folder"
        ) from None


def _shards(named: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no weight_map; download the folder again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
        if not files[0].is_file() and any(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: holds only pickled .bin weights, which are not read; convert them with transformers' "
                "save_pretrained"
            )
    for file in files:
        if file.parent.resolve() != folder.resolve():
            raise UserError(f"{folder / INDEX}: names {file.name} outside the folder; download the folder again")
        if not file.is_file():
            raise UserError(f"{file}: missing; the download of the model folder is not complete")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Read one JSON object of a model folder. Raises UserError for a file that is missing, broken or something else."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: missing; is this a Hugging Face model folder?") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # bad JSON, or not UTF-8
        raise UserError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no JSON object; download it again")
    return content


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file of a model folder, whole or not at all.

    Whoever may read the folder's other files may read this one: safetensors would let its owner alone.
    """
    part = file.with_name(file.name + ".part")
    part.touch()
    mode = part.stat().st_mode
    save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
    part.chmod(mode)
    os.replace(part, file)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one JSON file of a model folder, whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, file)
