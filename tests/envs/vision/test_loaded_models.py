"""Environments of one process share the models that they only look with."""

import os
from pathlib import Path

import pytest
import torch

from envs.vision import loaded_models
from envs.vision.loaded_models import shared_detr, shared_diffusion
from models.detr.checkpoint import save_detr
from models.detr.detr import Detr
from models.diffusion.folder import save_folder
from models.errors import UserError
from tests.models.detr.small import SMALL
from tests.models.diffusion.small_models import tiny_latent_diffusion


def test_a_folder_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_detr(Detr(SMALL), tmp_path / "detr")
    save_folder(tiny_latent_diffusion(), tmp_path / "diffusion")
    monkeypatch.chdir(tmp_path)
    eye, painter = shared_detr("detr", "cpu"), shared_diffusion("diffusion", "cpu")
    assert shared_detr(tmp_path / "detr", "cpu") is eye
    assert shared_diffusion(tmp_path / "diffusion", "cpu") is painter
    assert not any(p.requires_grad for p in eye.parameters())
    other = Detr(SMALL)
    save_detr(other, tmp_path / "detr")
    os.utime(tmp_path / "detr" / "model.safetensors", ns=(0, loaded_models._written("detr") + 1))
    torch.testing.assert_close(shared_detr("detr", "cpu").query_embed.weight, other.query_embed.weight)
    with pytest.raises(UserError, match="no such DETR"):
        shared_detr("nowhere", "cpu")
