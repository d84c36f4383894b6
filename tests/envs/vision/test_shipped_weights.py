"""What comes with the package is small enough, and what makes it too."""

from pathlib import Path

import numpy as np
import pytest
import torch

from agents.vision.detr import DetrJobConfig
from agents.vision.diffusion import DiffusionConfig
from agents.vision.pictures import as_bytes
from envs.vision import shipped_weights
from envs.vision.scene_agreement import SceneAgreement
from envs.vision.scene_spec import CATEGORIES
from envs.vision.shipped_weights import scenes_model
from launch.config import RunConfig, TrainOptions, apply_entries, combine, read_recipe
from models.detr.detr import Detr
from models.diffusion.autoencoder import Autoencoder
from models.diffusion.folder import load_folder
from models.diffusion.pipeline import text_to_image
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.unet import UNet
from models.errors import UserError

LARGEST = 10_000_000  # bytes
FILES = 150_000  # bytes left for the files beside the weights: tokenizer, configurations, figures


def configured(job: str, config: type) -> object:
    combined = combine("Train", options=TrainOptions, run=RunConfig, job=config)
    return apply_entries(combined, read_recipe(f"{job}-scenes-gpu", job), "the recipe").job


def bytes_in_half_precision(*models: torch.nn.Module) -> int:
    return 2 * sum(tensor.numel() for model in models for tensor in model.state_dict().values())


def test_the_recipes_make_models_of_at_most_ten_megabytes() -> None:
    diffusion, detr = configured("diffusion", DiffusionConfig), configured("detr", DetrJobConfig)
    network, size = diffusion.network, diffusion.data.size // diffusion.network.autoencoder().factor
    assert size == 16
    with torch.device("meta"):
        painter = Autoencoder(network.autoencoder()), UNet(network.unet(size)), TextEncoder(network.text_encoder())
        eye = Detr(detr.network.shape(CATEGORIES))
    for name, count in (("diffusion", bytes_in_half_precision(*painter)), ("detr", bytes_in_half_precision(eye))):
        print(f"{name}: {count / 1e6:.2f} MB, {count / 2e6:.2f}M numbers")
        assert count + FILES <= LARGEST


@pytest.mark.parametrize("kind", ["detr", "diffusion"])
def test_what_is_there_fits(kind: shipped_weights.Kind) -> None:
    folder = shipped_weights.WEIGHTS / f"{kind}-scenes"
    assert scenes_model(kind, None, "--flag") == folder
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= LARGEST
    assert (folder / "figures.json").is_file()


def test_what_is_drawn_is_what_was_asked_for() -> None:
    """The painter's and the eye's own weights, in few steps."""
    prompts = ["a large red circle in the centre, on a plain grey background"] * 4
    model = load_folder(scenes_model("diffusion", None, ""))
    judge = SceneAgreement(scenes_model("detr", None, ""))
    images = as_bytes(text_to_image(model, prompts, steps=8, guidance=4, generator=torch.Generator().manual_seed(0)))
    assert np.mean(judge(images, prompts)) >= 0.75
    assert np.mean(judge(images, ["a small blue square at the top left, on a plain grey background"] * 4)) == 0


def test_a_folder_that_is_given_comes_first(tmp_path: Path) -> None:
    assert scenes_model("detr", tmp_path, "--detector") == tmp_path
    with pytest.raises(
        UserError, match=r"nowhere: no model there; train one .*--recipe detr-scenes-gpu.* by --detector"
    ):
        scenes_model("detr", tmp_path / "nowhere", "--detector")
