import torch

from agents.vision.dense_scaffold import cell_labels
from envs.vision.sources import SceneSource
from models.detr.targets import Targets
from tests.agents.vision.test_detr import SCENES, batches, learner


def test_cells_are_named_after_the_smallest_box_over_them() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5], [0.3, 0.3, 0.2, 0.2]]])
    valid = torch.tensor([[True, True, False]])
    found = cell_labels(Targets(torch.tensor([[7, 3, 5]]), boxes, valid), None, 4, 4, 9)
    assert found.tolist() == [[[3, 3, 7, 7], [3, 3, 7, 7], [7, 7, 7, 7], [7, 7, 7, 7]]]
    without = Targets(torch.tensor([[7, 3, 5]]), boxes, torch.tensor([[False, True, False]]))
    assert cell_labels(without, None, 4, 4, 9)[0, 3].tolist() == [9, 9, 9, 9]
    pixels = torch.zeros(1, 8, 8, dtype=torch.bool)
    pixels[:, :, :4] = True  # the right half is padding
    padded = cell_labels(without, pixels, 4, 4, 9)
    assert padded[0, 0].tolist() == padded[0, 1].tolist() == [3, 9, 9, 9]


def test_the_scaffold_teaches_the_backbone_and_is_no_part_of_the_detector() -> None:
    pupil = learner(dense_weight=1.0)
    batch = batches(SceneSource(SCENES, 0, "train"), 0, 4)
    losses = [pupil.update(batch, want_metrics=True)["train/dense"] for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    assert not any(name == "head.weight" for name in pupil.net.state_dict())
