"""Which query answers for which object: the assignment of least cost (arXiv 2005.12872, equation 1).

L decoder layers, B images, Q queries, T objects at most, C classes with "no object" last.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.detr.boxes import cxcywh_to_xyxy, iou_and_giou
from models.detr.targets import Targets


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the three terms of an assignment's cost."""

    label: float = 1.0
    """Of -p(class)."""
    box: float = 5.0
    """Of the L1 distance between boxes (cxcywh)."""
    giou: float = 2.0
    """Of -GIoU."""


@torch.no_grad()
def cost_matrix(logits_LBQC: Tensor, boxes_LBQ4: Tensor, targets: Targets, costs: MatchingCosts) -> Tensor:
    """The cost (L, B, Q, T) of each query answering for each object, in float32.

    The probability is taken as it is, without a logarithm, so that it weighs as much as the boxes' terms (section 3.1).
    """
    layers, _, queries = logits_LBQC.shape[:3]
    probabilities = logits_LBQC.float().softmax(-1)
    labels = targets.labels_BT[None, :, None].expand(layers, -1, queries, -1)
    label_cost = -probabilities.gather(-1, labels)
    predicted, wanted = boxes_LBQ4.float()[:, :, :, None], targets.boxes_BT4.float()[None, :, None]
    box_cost = (predicted - wanted).abs().sum(-1)
    _, giou = iou_and_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return costs.label * label_cost + costs.box * box_cost - costs.giou * giou


def match(logits_LBQC: Tensor, boxes_LBQ4: Tensor, targets: Targets, costs: MatchingCosts) -> Tensor:
    """Return the query (L, B, T) that answers for each object, on the CPU: the one thing of a training step that the
    host has to wait for.

    -1: the object is padding, or there are more objects than queries and this one is left out. Each layer is matched
    on its own. A cost that is not finite counts as the worst one, so a NaN shows in the loss and not as a crash here.
    """
    cost_LBQT = cost_matrix(logits_LBQC, boxes_LBQ4, targets, costs).nan_to_num(nan=1e9, posinf=1e9, neginf=1e9)
    # The costs say what is padding: one transfer. Objects come first, for the solver is faster with the fewer rows.
    cost_LBQT = cost_LBQT.masked_fill(~targets.valid_BT[None, :, None], torch.inf)
    cost_LBTQ = cost_LBQT.transpose(2, 3).contiguous().cpu().numpy()
    queries_LBT = np.full(cost_LBTQ.shape[:3], -1, np.int64)
    for image, valid in enumerate(np.isfinite(cost_LBTQ[0, :, :, 0])):
        present = np.flatnonzero(valid)
        for layer in range(len(cost_LBTQ) if len(present) else 0):
            rows, columns = linear_sum_assignment(cost_LBTQ[layer, image, present])
            queries_LBT[layer, image, present[rows]] = columns
    return torch.from_numpy(queries_LBT)
