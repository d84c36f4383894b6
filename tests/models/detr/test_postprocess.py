"""Against transformers' DetrImageProcessor on the same predictions."""

from typing import Any

import pytest
import torch
from transformers import DetrImageProcessor
from transformers.models.detr.modeling_detr import DetrSegmentationOutput

from models.detr.detr import DetrOutput
from models.detr.postprocess import detections, panoptic

SIZES = [(60, 80), (48, 64), (33, 21)]


@pytest.fixture
def output() -> DetrOutput:
    """Confident predictions with blob-like masks, so that segments survive the thresholds."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 8, 5, generator=generator) * 4
    logits[..., -1] -= 2
    boxes = torch.rand(1, 3, 8, 4, generator=generator) * 0.5
    rows, columns = torch.arange(16)[:, None], torch.arange(20)[None]
    centres = torch.rand(3, 8, 2, generator=generator) * torch.tensor([16, 20])
    distance = (rows - centres[..., 0, None, None]) ** 2 + (columns - centres[..., 1, None, None]) ** 2
    return DetrOutput(logits, boxes, 12 - 0.6 * distance)


def as_peer(output: DetrOutput) -> Any:
    return DetrSegmentationOutput(
        logits=output.logits_BQC,
        pred_boxes=output.boxes_BQ4,
        pred_masks=None if output.masks_BQHW is None else output.masks_BQHW.clone(),
    )


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_detections(output: DetrOutput, threshold: float) -> None:
    theirs = DetrImageProcessor().post_process_object_detection(as_peer(output), threshold, SIZES)
    ours = detections(output, SIZES, threshold)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.scores, other["scores"])
        torch.testing.assert_close(mine.boxes, other["boxes"], atol=1e-4, rtol=1e-5)
        assert torch.equal(mine.labels, other["labels"])
        assert len(mine.queries) == len(mine.scores)


@pytest.mark.parametrize("threshold", [0.3, 0.85, 0.999])
@pytest.mark.parametrize("stuff", [set(), {1, 2}])
def test_panoptic(output: DetrOutput, threshold: float, stuff: set[int]) -> None:
    processor = DetrImageProcessor()
    theirs = processor.post_process_panoptic_segmentation(
        as_peer(output), threshold, label_ids_to_fuse=stuff, target_sizes=SIZES
    )
    ours = panoptic(output, SIZES, threshold, stuff=stuff)
    assert threshold > 0.9 or any(len(p.segments) > 1 for p in ours)
    for mine, other in zip(ours, theirs, strict=True):
        found = other["segmentation"].clamp(min=0)  # without any segment theirs is -1, otherwise 0 where there is none
        assert _partition(mine.ids) == _partition(found)
        unfused = [(s["label_id"], s["score"]) for s in other["segments_info"]]
        if not stuff:
            assert [(s.label, round(s.score, 6)) for s in mine.segments] == unfused
        else:  # theirs lists a fused segment once for each query
            assert {s.label for s in mine.segments} == {label for label, _ in unfused}
            assert len({s.label for s in mine.segments if s.label in stuff}) == sum(
                s.label in stuff for s in mine.segments
            )


def _partition(ids: torch.Tensor) -> set[tuple[int, ...]]:
    """The sets of pixels that share an id, whatever the ids are; nothing and a segment stay apart."""
    flat = ids.flatten()
    return {(int(i == 0), *(flat == i).nonzero().flatten().tolist()) for i in flat.unique()}


def test_panoptic_of_a_padded_batch(output: DetrOutput) -> None:
    assert output.masks_BQHW is not None
    alone = DetrOutput(output.logits_LBQC, output.boxes_LBQ4, output.masks_BQHW[:, :, :12, :15])
    cut = panoptic(output, SIZES, padded=[(12, 15)] * 3)
    for mine, other in zip(cut, panoptic(alone, SIZES)):
        assert torch.equal(mine.ids, other.ids)


def test_a_model_without_masks(output: DetrOutput) -> None:
    with pytest.raises(ValueError, match="no masks"):
        panoptic(DetrOutput(output.logits_LBQC, output.boxes_LBQ4), SIZES)
