"""Panoptic quality (Kirillov et al., arXiv 1801.00868): PQ = Σ IoU of matches / (TP + FP/2 + FN/2), class by class."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class _Class:
    iou: float = 0.0
    matched: int = 0
    false_positives: int = 0
    missed: int = 0


@dataclass
class PanopticQuality:
    """Gathers images with `add`; `result` averages over the classes that occurred."""

    classes: dict[int, _Class] = field(default_factory=dict)

    def add(
        self,
        truth: np.ndarray,
        truth_labels: Mapping[int, int],
        found: np.ndarray,
        found_labels: Mapping[int, int],
        crowds: Collection[int] = (),
    ) -> None:
        """truth, found: segment numbers (H, W); the labels say which class a number has. What has no label is void.

        Two segments match if they are of one class and their IoU exceeds 1/2, which at most one pair can. Void pixels
        of the truth count for no union. A segment found mostly on void, or on a crowd of its class, is no mistake.
        """
        # One sort of pairs of numbers, where there are far fewer pairs than pixels.
        pairs, pixels = np.unique(truth.astype(np.int64) << 32 | found.astype(np.int64), return_counts=True)
        truth_numbers, truth_index = np.unique(pairs >> 32, return_inverse=True)
        found_numbers, found_index = np.unique(pairs & 0xFFFFFFFF, return_inverse=True)
        shape = len(truth_numbers), len(found_numbers)
        overlap = np.zeros(shape, np.int64)
        overlap[truth_index, found_index] = pixels
        truth_area, found_area = overlap.sum(1), overlap.sum(0)
        labels_t = [truth_labels.get(int(n)) for n in truth_numbers]
        labels_f = [found_labels.get(int(n)) for n in found_numbers]
        void = np.array([label is None for label in labels_t])
        on_void = overlap[void].sum(0)

        matched_t: set[int] = set()
        matched_f: set[int] = set()
        for t, f in zip(*np.nonzero(overlap)):
            label = labels_t[t]
            if label is None or label != labels_f[f] or truth_numbers[t] in crowds:
                continue
            iou = overlap[t, f] / (truth_area[t] + found_area[f] - overlap[t, f] - on_void[f])
            if iou > 0.5:
                entry = self.classes.setdefault(label, _Class())
                entry.iou += float(iou)
                entry.matched += 1
                matched_t.add(int(t))
                matched_f.add(int(f))
        for t, label in enumerate(labels_t):
            if label is not None and t not in matched_t and truth_numbers[t] not in crowds:
                self.classes.setdefault(label, _Class()).missed += 1
        for f, label in enumerate(labels_f):
            if label is None or f in matched_f:
                continue
            excused = on_void[f] + sum(
                overlap[t, f] for t in range(shape[0]) if labels_t[t] == label and truth_numbers[t] in crowds
            )
            if excused <= 0.5 * found_area[f]:
                self.classes.setdefault(label, _Class()).false_positives += 1

    def result(self, stuff: Collection[int] = ()) -> dict[str, float]:
        """PQ, SQ (mean IoU of matches), RQ (F1 of matches), and PQ of things and of stuff alone; 0 with no class."""
        rows = {}
        for label, c in self.classes.items():
            weight = c.matched + 0.5 * c.false_positives + 0.5 * c.missed
            if weight:
                rows[label] = (c.iou / weight, c.iou / c.matched if c.matched else 0.0, c.matched / weight)

        def mean(column: int, labels: Collection[int]) -> float:
            return float(np.mean([rows[label][column] for label in labels])) if labels else 0.0

        things = [label for label in rows if label not in stuff]
        return {
            "PQ": mean(0, list(rows)),
            "SQ": mean(1, list(rows)),
            "RQ": mean(2, list(rows)),
            "PQ_things": mean(0, things),
            "PQ_stuff": mean(0, [label for label in rows if label in stuff]),
        }
