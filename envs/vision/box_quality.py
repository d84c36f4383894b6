"""How good a set of boxes is for one image: panoptic quality's form (arXiv 1801.00868, equation 2), on boxes.

    Σ IoU of the matches / (matches + unmatched answers / 2 + unmatched objects / 2)

It is 1 for the truth and for nothing else, grows with each object found and the better its box fits, and falls with
each box too many: a reward for a detector's whole answer on one image, where AP needs a whole data set.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

MATCHED_ABOVE = 0.5


def box_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """xyxy (n, 4) and (m, 4) → IoU (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = (high - low).clip(min=0).prod(-1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    return overlap / np.maximum(area_a[:, None] + area_b[None] - overlap, 1e-9)


def box_quality(boxes: np.ndarray, labels: np.ndarray, true_boxes: np.ndarray, true_labels: np.ndarray) -> float:
    """boxes xyxy (n, 4), labels (n,), of the answer and of the truth. Nothing where there is nothing counts as 1.

    Matches are one to one, of one class, with an IoU above 1/2; among all such the sum of IoUs is the greatest.
    """
    if len(boxes) == 0 or len(true_boxes) == 0:
        return float(len(boxes) == len(true_boxes))
    iou = box_ious(boxes, true_boxes)
    iou[(iou <= MATCHED_ABOVE) | (labels[:, None] != true_labels[None])] = 0
    rows, columns = linear_sum_assignment(iou, maximize=True)
    matched = iou[rows, columns]
    count = int((matched > 0).sum())
    return float(matched.sum() / (count + 0.5 * (len(boxes) - count) + 0.5 * (len(true_boxes) - count)))
