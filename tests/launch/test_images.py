import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import RunConfig
from launch.images import grid
from launch.run_directory import RunDirectory
from launch.runtime import EvaluationRuntime, Runtime


def test_images_side_by_side() -> None:
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 3, 3), np.uint8)
    picture = grid(images)
    assert picture.shape == (2 * 4 + 2, 3 * 3 + 2 * 2, 3)
    assert picture[::6, ::5, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
)
def test_what_is_no_image(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        grid(wrong)


def test_a_runs_images(tmp_path) -> None:
    directory = RunDirectory.create(tmp_path, "a", {"job": "demo"})
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    run = Runtime("demo", RunConfig(backend="local"), directory)
    run.images(3, "samples/heldout", images)
    run.close()
    stored = np.array(Image.open(directory.root / "images/3-samples-heldout.png"))
    assert np.array_equal(stored, grid(images))
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    assert [image.step for image in events.Images("samples/heldout")] == [3]

    evaluation = EvaluationRuntime("demo", RunConfig(backend="local"), directory)
    evaluation.images(4, "samples/again", images)
    evaluation.close()
    assert (directory.root / "images/4-samples-again.png").is_file()
    assert "samples/again" not in EventAccumulator(str(directory.tensorboard)).Reload().Tags()["images"]
