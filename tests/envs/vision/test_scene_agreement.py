from pathlib import Path

import numpy as np
import pytest
import torch

from envs.vision.scene_agreement import SceneAgreement, share_found
from envs.vision.scene_spec import CATEGORIES, KINDS, SceneSpec, parse_caption
from envs.vision.scenes import SceneConfig, make_scene
from models.detr.checkpoint import save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.detr.postprocess import Detections
from models.errors import UserError

SIZE = (90, 90)
TWO = parse_caption("a red circle at the top left and a blue star in the centre, on a plain black background")


def seen(*things: tuple[str, float, float]) -> Detections:
    """Detections of kinds with their centres, 10 pixels wide."""
    labels = torch.tensor([KINDS.index(kind) for kind, _, _ in things], dtype=torch.int64)
    centres = torch.tensor([[x, y] for _, x, y in things], dtype=torch.float32).reshape(-1, 2)
    boxes = torch.cat([centres - 5, centres + 5], dim=1)
    return Detections(torch.ones(len(things)), labels, boxes, torch.arange(len(things)))


@pytest.mark.parametrize(
    ("things", "share"),
    [
        ([("circle", 15, 15), ("star", 45, 45)], 1.0),
        ([("star", 45, 45), ("circle", 15, 15), ("ring", 80, 80)], 1.0),
        ([("circle", 15, 15), ("star", 45, 75)], 0.5),  # at another place
        ([("circle", 36, 15), ("square", 45, 45)], 0.5),  # within the slack; another kind
        ([("star", 15, 15), ("circle", 45, 45)], 0.0),
        ([], 0.0),
    ],
)
def test_kind_and_place(things: list, share: float) -> None:
    assert share_found(TWO.objects, seen(*things), SIZE) == share


def test_a_detection_counts_once() -> None:
    twice = SceneSpec((TWO.objects[0], TWO.objects[0]))
    assert share_found(twice.objects, seen(("circle", 15, 15)), SIZE) == 0.5


def test_an_empty_scene() -> None:
    assert share_found((), seen(), SIZE) == 1.0
    assert share_found((), seen(("star", 1, 1)), SIZE) == 0.0


def test_real_scenes_agree_with_their_own_boxes() -> None:
    for index in range(20):
        scene = make_scene(SceneConfig(size=96), seed=0, index=index)
        count = len(scene.labels)
        perfect = Detections(
            torch.ones(count), torch.tensor(scene.labels), torch.tensor(scene.boxes), torch.arange(count)
        )
        assert share_found(scene.spec.objects, perfect, (96, 96)) >= 1 - 1 / count  # one may be half hidden


def test_a_detector_looks(tmp_path: Path) -> None:
    config = DetrConfig(
        num_labels=len(CATEGORIES), num_queries=5, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        backbone=ResNetConfig("basic", (1, 1), (16, 32), 16),
    )  # fmt: skip
    save_detr(Detr(config), tmp_path)
    agreement = SceneAgreement(tmp_path)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    assert all(0 <= share <= 1 for share in agreement(images, [TWO.caption()] * 2))
    with pytest.raises(UserError, match="an elephant"):
        agreement(images, ["an elephant", TWO.caption()])
