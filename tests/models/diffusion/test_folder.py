"""What is wrong with a folder is named; what was written is read back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.diffusion.folder import load_folder, save_folder
from models.diffusion.tokenizer import PromptTokenizer, train_tokenizer
from models.errors import UserError
from tests.models.diffusion.small_models import CAPTIONS, latent_diffusion, tokenizer

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_folder(latent_diffusion(), folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to do damage to."""
    return shutil.copytree(whole, tmp_path / "copy")


def test_half_precision(tmp_path: Path) -> None:
    """Half the bytes, and read back in any precision."""
    save_folder(latent_diffusion(), tmp_path, torch.float16)
    stored = load_file(tmp_path / UNET_WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    expected = latent_diffusion().unet.state_dict()
    for name, tensor in load_folder(tmp_path).unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float()), name


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def edit_tensors(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return edit


def test_round_trip(folder: Path) -> None:
    model, expected = load_folder(folder), latent_diffusion()
    assert model.scheduler == expected.scheduler
    for part in ("unet", "autoencoder", "text_encoder"):
        ours, theirs = getattr(model, part), getattr(expected, part)
        assert ours.config == theirs.config
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(model.tokenizer(CAPTIONS), expected.tokenizer(CAPTIONS))


def test_old_names_of_the_autoencoders_attention(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "attentions" in name]:
            tensor = tensors.pop(name)
            for new_part, old_part in old.items():
                name = name.replace(f".{new_part}.", f".{old_part}.")
            tensors[name] = tensor

    edit_tensors(VAE_WEIGHTS, rename)(folder)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / VAE_WEIGHTS)
    expected = latent_diffusion().autoencoder.state_dict()
    for name, tensor in load_folder(folder).autoencoder.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), r"model_index\.json: missing"),
        (lambda folder: (folder / "vae/config.json").unlink(), r"vae/config\.json: missing"),
        (lambda folder: (folder / UNET_WEIGHTS).rename(folder / "unet/x.fp16.safetensors"), r"only x\.fp16"),
        (lambda folder: (folder / "scheduler").rename(folder / "old"), "scheduler: missing"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / UNET_WEIGHTS).write_bytes(b"\0" * 100), "not a whole safetensors file"),
        (edit_json("model_index.json", _class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
        (edit_json("model_index.json", vae=["diffusers", "AutoencoderTiny"]), "vae is a AutoencoderTiny"),
        (edit_json("model_index.json", unet=None), "names no unet"),
        (edit_json("text_encoder/config.json", num_hidden_layers=4), r"tensor encoder\.layers\.3.* is missing"),
        (edit_json("unet/config.json", cross_attention_dim=32), r"attn2\.to_k\.weight has shape \[16, 24\]"),
        (edit_tensors(UNET_WEIGHTS, lambda t: t.pop("conv_in.bias")), r"tensor conv_in\.bias is missing"),
        (edit_tensors(UNET_WEIGHTS, lambda t: t.update(extra=torch.zeros(1))), "unexpected tensor extra"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=named):
        load_folder(folder)


def test_a_folder_without_its_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"tokenizer/vocab\.json: missing"):
        load_folder(folder)


def test_parts_of_different_models(folder: Path) -> None:
    train_tokenizer(CAPTIONS, vocab_size=600, length=20).save(folder / "tokenizer")
    with pytest.raises(UserError, match="the tokenizer makes 20"):
        load_folder(folder)


def test_trained_tokenizer(tmp_path: Path) -> None:
    ours = tokenizer()
    ours.save(tmp_path)
    again = PromptTokenizer.load(tmp_path)
    prompts = [*CAPTIONS, "", "naïve ☃ Ünïcode"]
    tokens = ours(prompts)
    assert torch.equal(tokens, again(prompts))
    assert tokens.shape == (5, 16)
    assert (tokens[:, 0] == ours.start_id).all()
    assert (tokens[3, 1:] == ours.end_id).all()
    assert len(ours) <= 600
    lengths = (tokens != ours.end_id).sum(1) - 1
    assert lengths[1] == 3  # `two`, `green` and `triangles` were seen often enough to be one token each
    assert ours(["RED"])[0].tolist() == ours(["red"])[0].tolist()


def test_vocabulary_too_small() -> None:
    with pytest.raises(UserError, match="vocabulary of 100"):
        train_tokenizer(CAPTIONS, vocab_size=100, length=16)
