import numpy as np
import pytest

from envs.vision.salience import GAIN, inhibit, salience
from models.errors import UserError


def test_contrast_above_the_usual_stands_out() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    image[:, ::2] += 10  # stripes: a deviation of 5 everywhere
    image[16:32, 48:56] = 200  # half of cell (1, 3)
    found = salience(image, 4)
    assert found.shape == (4, 4)
    assert found.dtype == np.float32
    assert np.flatnonzero(found).tolist() == [7]
    columns = np.array([100, 110] * 4 + [200] * 8) / 255
    assert found[1, 3] == pytest.approx(min(1, GAIN * (columns.std() - 5 / 255)), abs=1e-3)


def test_each_channel_counts() -> None:
    """A red square on green of the same brightness."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 1] = 120
    image[4:12, 4:12] = (120, 0, 0)
    assert np.flatnonzero(salience(image, 2)).tolist() == [0]


def test_inhibition_takes_from_the_region_alone() -> None:
    found = np.ones((4, 4), np.float32)
    inhibit(found, np.s_[1:3, 0:2], left=0.25)
    assert found.sum() == 12 + 4 * 0.25
    assert (found[1:3, 0:2] == 0.25).all()


def test_cells_must_fit() -> None:
    with pytest.raises(UserError, match="60×64 pixels has no 16×16 cells"):
        salience(np.zeros((60, 64, 3), np.uint8), 16)
