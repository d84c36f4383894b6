from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.vision.detect import DetrEye
from envs.vision.scene_agreement import SceneAgreement, SceneDetector, share_found, share_of_all
from envs.vision.scene_spec import BACKGROUND_COLOURS, CATEGORIES, COLOURS, KINDS, SceneSpec, parse_caption
from envs.vision.scenes import Scene, SceneConfig, make_scene
from models.detr.checkpoint import save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.detr.postprocess import Detections
from models.errors import UserError
from tests.models.detr.small import SMALL

TWO = parse_caption("a red circle at the top left and a blue star in the centre, on a plain black background")


def seen(*things: tuple[str, float, float]) -> Detections:
    """Detections of kinds with their centres, 10 pixels wide."""
    labels = torch.tensor([KINDS.index(kind) for kind, _, _ in things], dtype=torch.int64)
    centres = torch.tensor([[x, y] for _, x, y in things], dtype=torch.float32).reshape(-1, 2)
    boxes = torch.cat([centres - 5, centres + 5], dim=1)
    return Detections(torch.ones(len(things)), labels, boxes, torch.arange(len(things)))


def truth(scene: Scene) -> Detections:
    """What a detector that makes no mistakes says."""
    count = len(scene.labels)
    return Detections(torch.ones(count), torch.tensor(scene.labels), torch.tensor(scene.boxes), torch.arange(count))


def painted(*things: tuple[str, float, float]) -> np.ndarray:
    """Black, with squares of a colour at centres, 10 pixels wide."""
    image = np.full((90, 90, 3), BACKGROUND_COLOURS["black"], np.uint8)
    for colour, x, y in things:
        image[int(y) - 5 : int(y) + 5, int(x) - 5 : int(x) + 5] = COLOURS[colour]
    return image


RED_AND_BLUE = painted(("red", 15, 15), ("red", 36, 15), ("blue", 45, 45), ("blue", 45, 75))


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
    assert share_found(TWO.objects, seen(*things), RED_AND_BLUE) == share


def test_the_colour_that_fills_the_box() -> None:
    found = seen(("circle", 15, 15), ("star", 45, 45))
    assert share_found(TWO.objects, found, painted(("red", 15, 15), ("blue", 45, 45))) == 1
    assert share_found(TWO.objects, found, painted(("orange", 15, 15), ("blue", 45, 45))) == 0.5
    assert share_found(TWO.objects, found, painted(("blue", 15, 15), ("red", 45, 45))) == 0
    assert share_found(TWO.objects, found, painted()) == 0  # a box around nothing
    outside = Detections(torch.ones(1), torch.tensor([0]), torch.tensor([[200.0, 0, 210, 10]]), torch.arange(1))
    assert share_found(TWO.objects, outside, painted()) == 0


def test_a_detection_counts_once() -> None:
    twice = SceneSpec((TWO.objects[0], TWO.objects[0]))
    assert share_found(twice.objects, seen(("circle", 15, 15)), RED_AND_BLUE) == 0.5


def test_detections_are_shared_out_so_that_most_objects_have_one() -> None:
    """One circle fits both places, the other the first alone."""
    circles = parse_caption("a red circle at the top left and a red circle at the top, on a plain black background")
    image = painted(("red", 32, 15), ("red", 10, 15))
    for order in ([("circle", 32, 15), ("circle", 10, 15)], [("circle", 10, 15), ("circle", 32, 15)]):
        assert share_found(circles.objects, seen(*order), image) == 1


def test_an_empty_scene() -> None:
    assert share_found((), seen(), painted()) == 1.0
    assert share_found((), seen(("star", 1, 1)), painted()) == 0.0


def test_a_scene_agrees_with_its_own_caption_and_with_no_other_colours() -> None:
    own, recoloured = [], []
    for index in range(100):
        scene = make_scene(SceneConfig(size=96, max_objects=3), seed=0, index=index)
        own.append(share_found(scene.spec.objects, truth(scene), scene.image))
        other = list(COLOURS)[1:] + list(COLOURS)[:1]
        changed = [replace(thing, colour=other[list(COLOURS).index(thing.colour)]) for thing in scene.spec.objects]
        recoloured.append(share_found(changed, truth(scene), scene.image))
    assert np.mean(own) > 0.98  # the rest is hidden by other objects
    assert np.mean(recoloured) < 0.01


def test_a_detector_looks(tmp_path: Path) -> None:
    config = DetrConfig(
        num_labels=len(CATEGORIES), labels=CATEGORIES, num_queries=5, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        backbone=ResNetConfig("basic", (1, 1), (16, 32), 16),
    )  # fmt: skip
    save_detr(Detr(config), tmp_path)
    agreement = SceneAgreement(tmp_path)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    assert all(0 <= share <= 1 for share in agreement(images, [TWO.caption()] * 2))
    with pytest.raises(UserError, match="an elephant"):
        agreement(images, ["an elephant", TWO.caption()])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (CATEGORIES[::-1], "label 0 is 'noisy background', of scenes it is 'circle'"),
        ((*KINDS, "cat"), "label 16 is 'cat', of scenes it is 'plain background'"),
        (KINDS[:4], "label 4 is missing, of scenes it is 'cross'"),
        ((), "does not name its labels"),
    ],
)
def test_a_detector_of_other_classes_is_refused(labels: tuple[str, ...], message: str, tmp_path: Path) -> None:
    save_detr(Detr(replace(SMALL, num_labels=len(labels) or 21, labels=labels)), tmp_path)
    for looks in (SceneDetector, DetrEye):
        with pytest.raises(UserError, match=message):
            looks(tmp_path)


def test_of_all_that_is_seen() -> None:
    exact = seen(("circle", 15, 15), ("star", 45, 45))
    crowded = seen(("circle", 15, 15), ("star", 45, 45), ("ring", 80, 80), ("cross", 10, 80))
    assert share_of_all(TWO.objects, exact, RED_AND_BLUE) == 1
    assert share_found(TWO.objects, crowded, RED_AND_BLUE) == 1
    assert share_of_all(TWO.objects, crowded, RED_AND_BLUE) == 0.5
    assert share_of_all(TWO.objects, seen(("circle", 15, 15)), RED_AND_BLUE) == 0.5
    background = Detections(
        torch.ones(1), torch.tensor([len(KINDS)]), torch.tensor([[0.0, 0, 90, 90]]), torch.arange(1)
    )
    assert share_of_all((), background, RED_AND_BLUE) == 1
    assert share_of_all((), exact, RED_AND_BLUE) == 0
