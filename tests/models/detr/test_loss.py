"""Matching and losses against transformers.loss.loss_for_object_detection, on random predictions.

transformers' model with `auxiliary_loss=True` is no oracle for whole training: its decoder then hands the normed output
of a layer to the next one, which the paper's does not. So its loss functions are called on our predictions.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DetrConfig as PeerConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, ForSegmentationLoss, HungarianMatcher

from models.detr.boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh
from models.detr.detr import DetrOutput
from models.detr.loss import SetLossConfig, set_loss
from models.detr.matcher import MatchingCosts, match
from models.detr.targets import Targets

LAYERS, IMAGES, QUERIES, LABELS = 3, 4, 6, 5


def predictions(seed: int = 0, masks: bool = False) -> DetrOutput:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return DetrOutput(
        normal(LAYERS, IMAGES, QUERIES, LABELS + 1).requires_grad_(),
        normal(LAYERS, IMAGES, QUERIES, 4).sigmoid().requires_grad_(),
        normal(IMAGES, QUERIES, 8, 10).requires_grad_() if masks else None,
    )


def objects(counts: tuple[int, ...] = (3, 0, 1, 5), seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(LABELS, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1,
            "masks": torch.rand(n, 32, 40, generator=generator) > 0.6,
        }
        for n in counts
    ]


def stacked(targets: list[dict[str, Tensor]]) -> Targets:
    return Targets.stack(*([t[key] for t in targets] for key in ("class_labels", "boxes", "masks")))


def pairs(queries_BT: Tensor) -> list[set[tuple[int, int]]]:
    return [{(q, t) for t, q in enumerate(row.tolist()) if q >= 0} for row in queries_BT]


@pytest.mark.parametrize("counts", [(3, 0, 1, 5), (1, 1, 1, 1), (0, 0, 0, 2), (9, 2, 7, 6)])
def test_matcher(counts: tuple[int, ...]) -> None:
    """The last case has more objects than queries."""
    output, targets = predictions(), objects(counts)
    found = match(output.logits_LBQC, output.boxes_LBQ4, stacked(targets), MatchingCosts())
    peer = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    for layer in range(LAYERS):
        theirs = peer({"logits": output.logits_LBQC[layer], "pred_boxes": output.boxes_LBQ4[layer]}, targets)
        assert pairs(found[layer]) == [set(zip(i.tolist(), j.tolist())) for i, j in theirs]


def test_an_image_is_matched_as_it_is_alone() -> None:
    output, targets = predictions(), objects()
    together = match(output.logits_LBQC, output.boxes_LBQ4, stacked(targets), MatchingCosts())
    for i, target in enumerate(targets):
        part = slice(i, i + 1)
        alone = match(output.logits_LBQC[:, part], output.boxes_LBQ4[:, part], stacked([target]), MatchingCosts())
        assert torch.equal(alone[:, 0], together[:, i, : alone.shape[2]])


def test_predictions_that_are_not_finite_are_matched_last() -> None:
    output, targets = predictions(), objects((3, 2, 1, 5))
    boxes = output.boxes_LBQ4.detach().clone()
    boxes[:, :, 0] = torch.nan
    found = match(output.logits_LBQC, boxes, stacked(targets), MatchingCosts())
    assert not (found == 0).any()


def peer_losses(output: DetrOutput, targets: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    config = PeerConfig(num_labels=LABELS, auxiliary_loss=True, decoder_layers=LAYERS, use_timm_backbone=False)
    last = output.logits_BQC, targets, "cpu", output.boxes_BQ4
    layers = output.logits_LBQC, output.boxes_LBQ4
    if output.masks_BQHW is None:
        return ForObjectDetectionLoss(*last, config, *layers)[:2]
    return ForSegmentationLoss(*last, output.masks_BQHW, config, *layers)[:2]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 1, 5), (9, 2, 7, 6)])
def test_each_loss_and_the_total(masks: bool, counts: tuple[int, ...]) -> None:
    output, targets = predictions(masks=masks), objects(counts)
    total, parts = set_loss(output, stacked(targets), SetLossConfig())
    peer_total, peer = peer_losses(output, targets)
    torch.testing.assert_close(total, peer_total, atol=1e-5, rtol=1e-5)
    names = {"label": "loss_ce", "box": "loss_bbox", "giou": "loss_giou"}
    for ours, theirs in names.items():
        expected = torch.stack([peer[f"{theirs}_{i}"] for i in range(LAYERS - 1)] + [peer[theirs]])
        torch.testing.assert_close(parts[ours], expected, atol=1e-5, rtol=1e-5)
    if masks:
        torch.testing.assert_close(parts["mask"], peer["loss_mask"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts["dice"], peer["loss_dice"], atol=1e-5, rtol=1e-5)


def test_gradients() -> None:
    output, targets = predictions(masks=True), objects()
    leaves = [output.logits_LBQC, output.boxes_LBQ4, output.masks_BQHW]
    ours = torch.autograd.grad(set_loss(output, stacked(targets), SetLossConfig())[0], leaves)
    theirs = torch.autograd.grad(peer_losses(output, targets)[0], leaves)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_weights_scale_their_losses() -> None:
    output, targets = predictions(masks=True), stacked(objects())
    plain, parts = set_loss(output, targets, SetLossConfig())
    for name in ("label", "box", "giou", "mask", "dice"):
        weight = getattr(SetLossConfig(), name)
        doubled, _ = set_loss(output, targets, replace(SetLossConfig(), **{name: 2 * weight}))
        torch.testing.assert_close(doubled - plain, weight * parts[name].sum(), atol=1e-4, rtol=1e-4)


def test_a_batch_without_objects() -> None:
    output = predictions(masks=True)
    total, parts = set_loss(output, stacked(objects((0, 0, 0, 0))), SetLossConfig())
    assert parts["box"].sum() == parts["giou"].sum() == parts["mask"] == parts["dice"] == 0
    total.backward()
    assert output.logits_LBQC.grad is not None
    assert output.logits_LBQC.grad.isfinite().all()


def test_perfect_predictions_cost_nothing() -> None:
    targets = objects((3, 2, 1, 5))
    stack = stacked(targets)
    logits = torch.full((1, IMAGES, QUERIES, LABELS + 1), -50.0)
    boxes = torch.rand(1, IMAGES, QUERIES, 4)
    masks = torch.full((IMAGES, QUERIES, 32, 40), -50.0)
    logits[..., -1] = 0
    for i, target in enumerate(targets):
        for t, label in enumerate(target["class_labels"]):
            q = QUERIES - 1 - t
            logits[0, i, q, -1], logits[0, i, q, label] = -50.0, 0
            boxes[0, i, q] = target["boxes"][t]
            masks[i, q] = target["masks"][t].float() * 100 - 50
    total, _ = set_loss(DetrOutput(logits, boxes, masks), stack, SetLossConfig())
    assert total == pytest.approx(0, abs=1e-4)


def test_boxes_without_area_have_finite_losses_and_gradients() -> None:
    output = predictions()
    flat = output.boxes_LBQ4.detach().clone()
    flat[..., 2:] = 0
    flat.requires_grad_()
    targets = stacked(objects())
    targets.boxes_BT4[..., 2:] = 0
    total, _ = set_loss(DetrOutput(output.logits_LBQC, flat), targets, SetLossConfig())
    total.backward()
    assert total.isfinite()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_giou_of_known_boxes() -> None:
    """Two unit squares that touch at a corner: no overlap, a hull of 4 of which 2 are empty."""
    a, b = torch.tensor([0.0, 0, 1, 1]), torch.tensor([1.0, 1, 2, 2])
    assert [x.item() for x in iou_and_giou(a, b)] == [0, -0.5]
    assert [x.item() for x in iou_and_giou(a, a)] == [1, 1]
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 1, 1])).tolist() == a.tolist()
    assert xyxy_to_cxcywh(b).tolist() == [1.5, 1.5, 1, 1]


class NothingThatWaits(TorchDispatchMode):
    """Refuses operations whose result the host must know before it can go on: for these it would wait for a GPU."""

    WAITING = ("aten.nonzero", "aten._local_scalar_dense", "aten.masked_select", "aten.equal", "aten.unique")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(function).startswith(self.WAITING), function
        if str(function).startswith(("aten.index.", "aten.index_put")):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), function
        return function(*args, **(kwargs or {}))


def test_after_matching_no_loss_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    output, targets = predictions(masks=True), stacked(objects())
    matched = match(output.logits_LBQC, output.boxes_LBQ4, targets, MatchingCosts())
    assert matched.device.type == "cpu"
    monkeypatch.setattr("models.detr.loss.match", lambda *_: matched)
    with NothingThatWaits():
        set_loss(output, targets, SetLossConfig())[0].backward()
