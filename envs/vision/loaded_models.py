"""Models that what looks and draws in one process share: an agent makes its environment anew for every evaluation.

They are never trained, so that sharing them changes nothing. A folder whose files have changed is read again.
"""

import functools
from pathlib import Path

from envs.vision.scene_spec import CATEGORIES, KINDS
from models.detr.checkpoint import load_detr
from models.detr.detr import Detr
from models.diffusion.folder import load_folder
from models.diffusion.pipeline import LatentDiffusion
from models.errors import UserError

KEPT = 2  # of each kind


def shared_detr(path: str | Path, device: str) -> Detr:
    """Raises UserError as `load_detr` does."""
    return _detr(Path(path).resolve(), _written(path), device)


def shared_scene_detector(path: str | Path, device: str) -> Detr:
    """A detector whose labels are those of scenes, with or without the backgrounds. Raises UserError as `load_detr`
    does, and for a detector of other classes."""
    model = shared_detr(path, device)
    labels = model.config.labels
    if not labels:
        raise UserError(f"{path}: does not name its labels: name those of scenes by id2label in its config.json")
    for i, wanted in enumerate(CATEGORIES if len(labels) > len(KINDS) else KINDS):
        if i >= len(labels) or labels[i] != wanted:
            there = repr(labels[i]) if i < len(labels) else "missing"
            raise UserError(f"{path}: label {i} is {there}, of scenes it is {wanted!r}; is it a detector of scenes?")
    return model


def shared_diffusion(folder: str | Path, device: str) -> LatentDiffusion:
    """In float32. Raises UserError as `load_folder` does."""
    return _diffusion(Path(folder).resolve(), _written(folder), device)


@functools.lru_cache(KEPT)
def _detr(path: Path, written: int, device: str) -> Detr:
    return load_detr(path).to(device).requires_grad_(False)


@functools.lru_cache(KEPT)
def _diffusion(folder: Path, written: int, device: str) -> LatentDiffusion:
    return load_folder(folder, device=device)


def _written(path: str | Path) -> int:
    """When the newest file was written, in nanoseconds."""
    return max((file.stat().st_mtime_ns for file in [Path(path), *Path(path).rglob("*")] if file.exists()), default=0)
