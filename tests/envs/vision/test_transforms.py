import numpy as np
import pytest

from envs.vision.example import Example, collate
from envs.vision.scenes import SceneConfig
from envs.vision.sources import SceneSource
from envs.vision.transforms import ResizeConfig, flipped, resized
from models.errors import UserError

EXAMPLE = SceneSource(SceneConfig(), 0, "train").example(0)


def boxes_of(example: Example) -> np.ndarray:
    assert example.ids is not None
    boxes = []
    for i in range(len(example.labels)):
        rows, columns = np.nonzero(example.ids == i + 1)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return np.array(boxes)


@pytest.mark.parametrize("side", [64, 200])
def test_boxes_and_masks_follow_the_image(side: int) -> None:
    wide = Example(EXAMPLE.image[:96], EXAMPLE.labels[-1:], np.array([[0, 0, 128, 96]], np.float32),
                   np.ones((96, 128), np.int16))  # fmt: skip
    small = resized(wide, ResizeConfig((side,), 1000), None)
    assert small.image.shape == (side, round(side * 128 / 96), 3)
    assert small.boxes.tolist() == [[0, 0, small.image.shape[1], side]]
    scaled = resized(EXAMPLE, ResizeConfig((side,), 1000), None)
    assert np.abs(boxes_of(scaled)[:-1] - scaled.boxes[:-1]).max() <= 2
    limited = resized(wide, ResizeConfig((60,), 64), None)
    assert limited.image.shape == (48, 64, 3)


def test_the_shorter_side_is_drawn() -> None:
    rng = np.random.default_rng(0)
    sides = {resized(EXAMPLE, ResizeConfig((64, 80, 96), 200), rng).image.shape[0] for _ in range(20)}
    assert sides == {64, 80, 96}


def test_a_flip_mirrors_everything() -> None:
    rng = np.random.default_rng(0)
    outcomes = [flipped(EXAMPLE, rng) for _ in range(20)]
    mirrored = [e for e in outcomes if e is not EXAMPLE]
    assert 4 < len(mirrored) < 16
    assert np.array_equal(mirrored[0].image[:, ::-1], EXAMPLE.image)
    assert np.array_equal(boxes_of(mirrored[0])[:-1], mirrored[0].boxes[:-1])


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="do not fit together"):
        ResizeConfig((800,), 700)


def test_masks_travel_as_bytes_until_there_are_too_many() -> None:
    few, many = (
        Example(np.zeros((32, 32, 3), np.uint8), np.zeros(n, np.int64), np.zeros((n, 4), np.float32),
                np.full((32, 32), n, np.int16)) for n in (255, 256)
    )  # fmt: skip
    for example, dtype in ((few, np.uint8), (many, np.int16)):
        batch = collate([example])
        assert batch.ids_BHW is not None
        assert batch.ids_BHW.dtype == dtype
        masks = batch.to_device("cpu").targets.masks_BTHW
        assert masks is not None
        assert masks.flatten(2).all(-1)[0].nonzero().tolist() == [[len(example.labels) - 1]]
        assert masks.sum() == 32 * 32
