"""Stable Diffusion v1 folders in and out, in the layout of diffusers. Only safetensors are read, nothing is unpickled.

model_index.json
unet/ vae/           config.json  diffusion_pytorch_model.safetensors
text_encoder/        config.json  model.safetensors
tokenizer/           vocab.json  merges.txt  tokenizer_config.json  ...
scheduler/           scheduler_config.json
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from models.diffusion.autoencoder import Autoencoder
from models.diffusion.config import AutoencoderConfig, ComponentConfig, TextEncoderConfig, UNetConfig
from models.diffusion.noise_schedule import NAMES, SchedulerConfig
from models.diffusion.pipeline import LatentDiffusion
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.tokenizer import PromptTokenizer
from models.diffusion.unet import UNet
from models.errors import UserError
from models.language.checkpoint import read_json, write_json, write_tensors

_CLASSES = {
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL"},
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
    "scheduler": set(NAMES),
}
_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_TEXT_PREFIX = "text_model."
# The autoencoder's attention in folders that older versions of diffusers wrote, SD v1's own among them.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

Part = TypeVar("Part", bound=nn.Module)


def load_folder(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LatentDiffusion:
    """Read a folder, with its scheduler as diffusers' pipeline sets it (`SchedulerConfig.in_pipeline`).

    Raises UserError naming what is missing, of another kind, broken, or of another shape.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise UserError(f"{folder / 'model_index.json'}: a {pipeline}; only StableDiffusionPipeline (v1) is supported")
    for part, classes in _CLASSES.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise UserError(f"{folder / 'model_index.json'}: names no {part}")
        if entry[1] not in classes:
            known = " or ".join(sorted(classes))
            raise UserError(f"{folder / 'model_index.json'}: the {part} is a {entry[1]}; only {known} is supported")
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: missing; the download of the folder is not complete")

    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    model = LatentDiffusion(
        autoencoder=_load_part(folder / "vae", AutoencoderConfig, Autoencoder, dtype, device),
        unet=_load_part(folder / "unet", UNetConfig, UNet, dtype, device),
        text_encoder=_load_part(folder / "text_encoder", TextEncoderConfig, TextEncoder, dtype, device),
        tokenizer=PromptTokenizer.load(folder / "tokenizer"),
        scheduler=SchedulerConfig.from_json(read_json(scheduler_file), str(scheduler_file)).in_pipeline(),
    )
    _check_fit(model, folder)
    return model


def save_folder(model: LatentDiffusion, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that diffusers' StableDiffusionPipeline loads. Raises UserError if it cannot be written.

    dtype: of the weights in the files; `load_folder` takes any.
    model_index.json is written last: a folder that a crash left half written is not taken for a whole one.
    """
    folder = Path(folder)
    try:
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in _CLASSES:
            (folder / part).mkdir(parents=True, exist_ok=True)
        _save_part(folder / "unet", model.unet, "UNet2DConditionModel", dtype)
        _save_part(folder / "vae", model.autoencoder, "AutoencoderKL", dtype)
        _save_part(folder / "text_encoder", model.text_encoder, "CLIPTextModel", dtype, model.tokenizer)
        model.tokenizer.save(folder / "tokenizer")
        scheduler = model.scheduler.to_json()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
        write_json(folder / "model_index.json", index)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: cannot write the model ({error}); free some space or choose another folder"
        ) from None


def _load_part(
    folder: Path,
    config_class: type[ComponentConfig],
    build: Callable[[Any], Part],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Part:
    config = config_class.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):  # no memory and no initialisation for weights that are about to be read
        module = build(config)
    module = module.to(dtype).to_empty(device=device)
    _copy_weights(module, folder / _WEIGHTS[folder.name])
    return module.eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(module: nn.Module, file: Path) -> None:
    if not file.is_file():
        others = sorted(path.name for path in file.parent.iterdir() if path.suffix in (".bin", ".safetensors"))
        found = f"there is only {', '.join(others)}" if others else "the download of the folder is not complete"
        raise UserError(f"{file}: missing; {found}")
    slots = dict(module.named_parameters())
    waiting = set(slots)
    try:
        with safe_open(file, framework="pt") as tensors:
            for stored_name in tensors.keys():  # noqa: SIM118  (not a dict)
                name = _today(stored_name)
                if name.endswith("position_ids"):
                    continue  # a constant that older folders carry
                if name not in slots:
                    raise UserError(f"{file}: unexpected tensor {stored_name}; does config.json describe this model?")
                tensor = tensors.get_tensor(stored_name)
                if tensor.shape != slots[name].shape:
                    raise UserError(
                        f"{file}: {stored_name} has shape {list(tensor.shape)}, but config.json asks for "
                        f"{list(slots[name].shape)}"
                    )
                slots[name].copy_(tensor)
                waiting.discard(name)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if waiting:
        raise UserError(f"{file}: tensor {min(waiting)} is missing ({len(waiting)} in all)")


def _today(name: str) -> str:
    name = name.removeprefix(_TEXT_PREFIX)
    if "mid_block.attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def _check_fit(model: LatentDiffusion, folder: Path) -> None:
    """Parts that were put together from different models."""
    unet, text = model.unet.config, model.text_encoder.config
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"{folder}: the text encoder's hidden_size is {text.hidden_size}, but the UNet attends to a text of width "
            f"{unet.cross_attention_dim}"
        )
    channels = model.autoencoder.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise UserError(
            f"{folder}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels, but the latents of "
            f"the autoencoder have {channels}"
        )
    if len(model.tokenizer) > text.vocab_size or model.tokenizer.length > text.max_position_embeddings:
        raise UserError(
            f"{folder}: the tokenizer makes {model.tokenizer.length} of {len(model.tokenizer)} tokens, but the text "
            f"encoder knows {text.vocab_size} at {text.max_position_embeddings} positions"
        )


def _save_part(
    folder: Path,
    module: UNet | Autoencoder | TextEncoder,
    class_name: str,
    dtype: torch.dtype,
    tokenizer: PromptTokenizer | None = None,
) -> None:
    config = module.config.to_json()
    prefix = ""
    if tokenizer is None:
        config |= {"_class_name": class_name}
    else:
        prefix = _TEXT_PREFIX
        config |= {"architectures": [class_name], "model_type": "clip_text_model"}
        config |= {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}
        config |= {"pad_token_id": tokenizer.pad_id}
    write_json(folder / "config.json", config)
    tensors = {
        prefix + name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()
    }
    write_tensors(folder / _WEIGHTS[folder.name], tensors)
