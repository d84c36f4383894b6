"""Prompts to pictures, by models of test size and by the program that stands in for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.vision.prompt_drawing import DiffusionDrawer, RenderingDrawer
from envs.vision.scene_agreement import share_found
from envs.vision.scene_spec import CATEGORIES, parse_caption, understood
from models.detr.checkpoint import save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.diffusion.folder import save_folder
from models.errors import UserError
from tests.models.diffusion.small_models import CAPTIONS, tiny_latent_diffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    diffusion, detector = tmp_path_factory.mktemp("diffusion"), tmp_path_factory.mktemp("detector")
    save_folder(tiny_latent_diffusion(), diffusion)
    torch.manual_seed(0)
    config = DetrConfig(
        num_labels=len(CATEGORIES), labels=CATEGORIES, num_queries=5, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        backbone=ResNetConfig("basic", (1, 1), (16, 32), 16),
    )  # fmt: skip
    save_detr(Detr(config), detector)
    return diffusion, detector


def test_seed_and_prompt_decide_the_picture(folders: tuple[Path, Path]) -> None:
    draw = DiffusionDrawer(*folders, steps=3)
    prompts = [*CAPTIONS, "no words of the grammar, and far too many for a tokenizer of sixteen tokens " * 3]
    drawings = draw(prompts)
    assert [drawing.image.shape for drawing in drawings] == [(16, 16, 3)] * 4
    again = DiffusionDrawer(*folders, steps=3)(prompts)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(drawings, again))
    alone = draw([CAPTIONS[1]])[0].image  # whatever else is in the batch, but for rounding
    assert np.abs(alone.astype(int) - drawings[1].image.astype(int)).max() <= 1
    other_seed = DiffusionDrawer(*folders, steps=3, seed=1)(prompts)
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(drawings, other_seed))


def test_the_detector_looks_at_the_picture(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.vision.scene_agreement.THRESHOLD", 0.0)  # whatever an untrained one sees
    (drawing,) = DiffusionDrawer(*folders, steps=2)(["a red circle"])
    assert len(drawing.found.labels) == 5
    assert drawing.found.boxes.max() > 1  # in pixels


def test_folders_that_are_no_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        DiffusionDrawer(tmp_path, folders[1])
    with pytest.raises(UserError, match=str(tmp_path)):
        DiffusionDrawer(folders[0], tmp_path)


def test_the_stand_in_draws_what_it_understands() -> None:
    caption = "a large red circle at the top left and a blue star on the right, on a plain black background"
    draw = RenderingDrawer(seed=0)
    (drawing,) = draw([caption])
    assert share_found(parse_caption(caption).objects, drawing.found, drawing.image) == 1
    assert np.array_equal(draw([caption])[0].image, drawing.image)
    assert len(draw(["please, a blue star and perhaps an orange ring at the top"])[0].found.labels) == 2
    assert len(draw(["nothing of note"])[0].found.labels) == 0
    assert len(draw(["a red circle " * 50])[0].found.labels) <= 9


def test_understood() -> None:
    rng = np.random.default_rng(0)
    caption = "a small dotted pink cross in the centre, on a noisy navy background"
    assert understood(caption, rng) == parse_caption(caption)
    spec = understood("a striped red handwritten 7 with a green ring on the left", rng)
    assert [(thing.kind, thing.texture) for thing in spec.objects] == [("7", "solid"), ("ring", "solid")]
    assert spec.objects[1].place == 3
    assert len({understood("a red ring", rng).objects[0].place for _ in range(50)}) == 9
