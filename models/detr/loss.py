"""DETR's set loss (arXiv 2005.12872, section 3.1 and appendix A.2), on every decoder layer.

L decoder layers, B images, Q queries, T objects at most, C classes with "no object" last.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.detr.boxes import cxcywh_to_xyxy, iou_and_giou
from models.detr.detr import DetrOutput
from models.detr.matcher import MatchingCosts, match
from models.detr.targets import Targets


@dataclass(frozen=True)
class SetLossConfig:
    """Weights of the losses, as published."""

    costs: MatchingCosts = field(default_factory=MatchingCosts)
    no_object_weight: float = 0.1
    """Weight of queries without an object in the cross-entropy: they outnumber the others."""
    label: float = 1.0
    box: float = 5.0
    giou: float = 2.0
    mask: float = 1.0
    """Of the focal loss on masks."""
    dice: float = 1.0


def set_loss(output: DetrOutput, targets: Targets, config: SetLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the total and its parts: "label", "box", "giou" as vectors (L,), "mask" and "dice" as scalars.

    The total sums all layers (the auxiliary losses are those of the layers but the last). Sums over objects are divided
    by the number of objects in the batch, at least 1.
    """
    matched_LBT = match(output.logits_LBQC, output.boxes_LBQ4, targets, config.costs)
    queries_LBT = matched_LBT.to(output.logits_LBQC.device, non_blocking=True)
    count = targets.valid_BT.sum().clamp(min=1)
    parts = {
        "label": label_loss(output.logits_LBQC, targets.labels_BT, queries_LBT, config.no_object_weight),
        **box_losses(output.boxes_LBQ4, targets.boxes_BT4, queries_LBT, count),
    }
    if output.masks_BQHW is not None and targets.masks_BTHW is not None:
        parts |= mask_losses(output.masks_BQHW, targets.masks_BTHW, matched_LBT[-1], count)
    total = torch.stack([getattr(config, name) * value.sum() for name, value in parts.items()]).sum()
    return total, parts


def label_loss(logits_LBQC: Tensor, labels_BT: Tensor, queries_LBT: Tensor, no_object_weight: float) -> Tensor:
    """Cross-entropy (L,) over all queries, unmatched ones towards "no object"; a mean weighted by class."""
    layers, images, queries, classes = logits_LBQC.shape
    wanted_LBQ = labels_BT.new_full((layers, images, queries + 1), classes - 1)
    slots_LBT = queries_LBT.where(queries_LBT >= 0, queries)  # objects without a query go to a slot that is cut off
    wanted_LBQ.scatter_(2, slots_LBT, labels_BT.expand(layers, -1, -1))
    wanted_LBQ = wanted_LBQ[..., :queries]
    weights_LBQ = torch.where(wanted_LBQ == classes - 1, no_object_weight, 1.0)
    losses_LBQ = F.cross_entropy(logits_LBQC.float().flatten(0, 2), wanted_LBQ.flatten(), reduction="none")
    losses_LBQ = losses_LBQ.view_as(weights_LBQ)
    return (weights_LBQ * losses_LBQ).sum((1, 2)) / weights_LBQ.sum((1, 2))


def box_losses(boxes_LBQ4: Tensor, wanted_BT4: Tensor, queries_LBT: Tensor, count: Tensor) -> dict[str, Tensor]:
    """L1 on cxcywh ("box") and 1 - GIoU ("giou"), each (L,), of the matched pairs."""
    matched_LBT = queries_LBT >= 0
    index = queries_LBT.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
    found_LBT4 = boxes_LBQ4.float().gather(2, index)
    wanted_LBT4 = wanted_BT4.float().expand_as(found_LBT4)
    distance_LBT = (found_LBT4 - wanted_LBT4).abs().sum(-1)
    _, giou_LBT = iou_and_giou(cxcywh_to_xyxy(found_LBT4), cxcywh_to_xyxy(wanted_LBT4))
    nothing = distance_LBT.new_zeros(())
    return {
        "box": distance_LBT.where(matched_LBT, nothing).sum((1, 2)) / count,
        "giou": (1 - giou_LBT).where(matched_LBT, nothing).sum((1, 2)) / count,
    }


def mask_losses(masks_BQhw: Tensor, wanted_BTHW: Tensor, queries_BT: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Focal ("mask") and dice loss of the matched queries' masks, scaled up to the size of the wanted ones.

    queries_BT: on the CPU, where it can be known without waiting for the GPU how many pairs there are.
    """
    queries = queries_BT.numpy()
    images, objects = np.nonzero(queries >= 0)
    if len(images) == 0:
        nothing = 0 * masks_BQhw.sum()  # keeps the graph
        return {"mask": nothing, "dice": nothing}
    rows = [images * masks_BQhw.shape[1] + queries[images, objects], images * wanted_BTHW.shape[1] + objects]
    found_N, sought_N = torch.from_numpy(np.stack(rows)).to(masks_BQhw.device, non_blocking=True)
    logits_NHW = masks_BQhw.flatten(0, 1).index_select(0, found_N).float()
    wanted_NHW = wanted_BTHW.flatten(0, 1).index_select(0, sought_N).float()
    logits_NHW = F.interpolate(logits_NHW[:, None], size=wanted_NHW.shape[-2:], mode="bilinear")[:, 0]
    logits_NP, wanted_NP = logits_NHW.flatten(1), wanted_NHW.flatten(1)
    return {
        "mask": focal_loss(logits_NP, wanted_NP).mean(1).sum() / count,
        "dice": dice_loss(logits_NP, wanted_NP).sum() / count,
    }


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-α_t (1 - p_t)^γ log p_t, element by element (Lin et al., arXiv 1708.02002, equation 5)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    probability = logits.sigmoid()
    miss = probability + wanted - 2 * probability * wanted  # 1 - p_t
    return (alpha * wanted + (1 - alpha) * (1 - wanted)) * cross_entropy * miss**gamma


def dice_loss(logits_NP: Tensor, wanted_NP: Tensor) -> Tensor:
    """1 - (2 Σ p·w + 1) / (Σ p + Σ w + 1), one number (N,) a mask (Milletari et al., arXiv 1606.04797)."""
    probability = logits_NP.sigmoid()
    overlap = 2 * (probability * wanted_NP).sum(-1)
    return 1 - (overlap + 1) / (probability.sum(-1) + wanted_NP.sum(-1) + 1)
