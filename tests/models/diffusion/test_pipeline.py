"""Text to image and image to image from a folder, against diffusers' pipelines with the same noise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from models.diffusion.folder import load_folder, save_folder
from models.diffusion.noise_schedule import NAMES, SchedulerConfig
from models.diffusion.pipeline import LatentDiffusion, image_to_image, text_to_image
from models.diffusion.schedulers import DDIM
from models.errors import UserError
from tests.models.diffusion.small_models import CAPTIONS, latent_diffusion

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = [CAPTIONS[0], "A PURPLE Ellipse, unseen!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by diffusers, from what we wrote: each reads what the other writes."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    save_folder(latent_diffusion(), ours)
    pipeline = StableDiffusionPipeline.from_pretrained(ours, safety_checker=None)
    pipeline.save_pretrained(theirs)
    return theirs


def with_scheduler(folder: Path, name: str) -> LatentDiffusion:
    return replace(load_folder(folder), scheduler=SchedulerConfig.sd_v1(name))


def reference(cls: type, folder: Path, name: str) -> StableDiffusionPipeline:
    pipeline = cls.from_pretrained(folder, safety_checker=None)
    settings = SchedulerConfig.sd_v1(name).to_json()
    pipeline.scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", NAMES.values())
def test_text_to_image(folder: Path, name: str) -> None:
    model = with_scheduler(folder, name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = text_to_image(
        model, PROMPTS, steps=5, guidance=3.0, negative="square", latents_BZhw=noise,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    expected = reference(StableDiffusionPipeline, folder, name)(
        PROMPTS, num_inference_steps=5, guidance_scale=3.0, negative_prompt=["square"] * 2, latents=noise,
        output_type="pt", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    torch.testing.assert_close(images, expected, **TOLERANCE)
    assert expected.std() > 0.05  # not saturated


def with_scheduler_config(folder: Path, copy: Path, name: str, settings: dict) -> Path:
    """The folder with another scheduler, whose file says this and nothing else beside the noise."""
    shutil.copytree(folder, copy)
    class_name = next(cls for cls, ours in NAMES.items() if ours == name)
    index = json.loads((copy / "model_index.json").read_text()) | {"scheduler": ["diffusers", class_name]}
    (copy / "model_index.json").write_text(json.dumps(index))
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    content = {"_class_name": class_name, **noise, **settings}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    return copy


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"steps_offset": 0, "timestep_spacing": "leading"}, {"clip_sample": True, "set_alpha_to_one": True}],
    ids=["defaults", "leading", "clipped"],
)
@pytest.mark.parametrize("name", NAMES.values())
def test_the_scheduler_of_the_folder_draws_as_in_the_pipeline(
    folder: Path, tmp_path: Path, name: str, settings: dict
) -> None:
    """Whose constructor changes what scheduler_config.json says, or leaves out."""
    copy = with_scheduler_config(folder, tmp_path / "copy", name, settings)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    images = text_to_image(
        load_folder(copy), PROMPTS, steps=10, guidance=3.0, latents_BZhw=noise, generator=generators[0]
    )
    pipeline = StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS, num_inference_steps=10, guidance_scale=3.0, latents=noise, output_type="pt", generator=generators[1]
    ).images
    torch.testing.assert_close(images, expected, **TOLERANCE)
    assert expected.std() > 0.05


def test_another_scheduler_inherits_what_the_pipeline_set(folder: Path, tmp_path: Path) -> None:
    copy = with_scheduler_config(folder, tmp_path / "copy", "pndm", {})
    config = DDIM(load_folder(copy).scheduler.with_name("ddim"), 5).config
    assert (config.clip_sample, config.steps_offset) == (False, 1)


def test_text_to_image_of_its_own_size_without_guidance(folder: Path) -> None:
    images = text_to_image(
        load_folder(folder), PROMPTS, steps=3, guidance=1, size=(48, 80), generator=torch.Generator().manual_seed(0)
    )
    expected = reference(StableDiffusionPipeline, folder, "pndm")(
        PROMPTS, num_inference_steps=3, guidance_scale=1, height=48, width=80, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    torch.testing.assert_close(images, expected, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES.values())
def test_image_to_image(folder: Path, name: str) -> None:
    model = with_scheduler(folder, name)
    pictures = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(5))
    images = image_to_image(
        model, pictures, PROMPTS, strength=0.7, steps=6, guidance=2.0, generator=torch.Generator().manual_seed(1)
    )
    expected = reference(StableDiffusionImg2ImgPipeline, folder, name)(
        PROMPTS, pictures, strength=0.7, num_inference_steps=6, guidance_scale=2.0, output_type="pt",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    torch.testing.assert_close(images, expected, **TOLERANCE)


def test_prompts_condition_the_image(folder: Path) -> None:
    model = load_folder(folder)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    one, other = text_to_image(model, PROMPTS, steps=3, latents_BZhw=noise)
    assert (one - other).abs().max() > 1e-3


def test_the_same_seed_repeats_bit_for_bit(folder: Path) -> None:
    model = with_scheduler(folder, "ddpm")
    draw = [text_to_image(model, PROMPTS, steps=3, generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda model: text_to_image(model, ["x"], size=(64, 60)), "multiples of 8"),
        (lambda model: text_to_image(model, ["x"], steps=0), "0 sampling steps"),
        (lambda model: image_to_image(model, torch.zeros(1, 3, 64, 60), ["x"]), "multiples of 8"),
        (lambda model: image_to_image(model, torch.zeros(1, 3, 64, 64), ["x", "y"]), "1 images but 2 prompts"),
        (lambda model: image_to_image(model, torch.zeros(1, 3, 64, 64), ["x"], strength=0.01), "no step"),
        (lambda model: model.scheduler.with_name("ddpmm"), "did you mean `ddpm`"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, named: str) -> None:
    with pytest.raises(UserError, match=named):
        call(latent_diffusion())
