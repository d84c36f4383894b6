"""A trained detector's labels and those of the data that it is to see: found by name, and put in the data's order."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from models.detr.config import DetrConfig
from models.detr.detr import Detr
from models.errors import UserError

log = logging.getLogger(__name__)


@torch.no_grad()
def with_labels(model: Detr, names: tuple[str, ...], category_ids: Sequence[int], source: str) -> Detr:
    """The model with the classes of the data alone, as labels 0 to n-1: changed in place.

    names, category_ids: of the data's labels. Raises UserError if the model, which `source` names, lacks one of them.
    """
    rows = labels_in(model.config, names, category_ids, source)
    old = model.class_embed
    new = nn.Linear(old.in_features, len(rows) + 1, device=old.weight.device, dtype=old.weight.dtype)
    kept = torch.tensor([*rows, model.config.num_labels])  # "no object" stays the last
    new.weight.copy_(old.weight[kept])
    new.bias.copy_(old.bias[kept])
    model.class_embed = new
    model.config = replace(model.config, num_labels=len(rows), labels=names)
    return model


def labels_in(config: DetrConfig, names: Sequence[str], category_ids: Sequence[int], source: str) -> list[int]:
    """Which label of a detector each of the data's is: by name, or by COCO's category number where the detector names
    none, as the files of the original code do not. Raises UserError, naming the first that it lacks."""
    if config.labels:
        label_of = {name: i for i, name in reversed(list(enumerate(config.labels)))}
        missing = [name for name in names if name not in label_of]
        if missing:
            raise UserError(
                f"{source}: knows no label {missing[0]!r}, which the data has ({len(missing)} such in all): its own "
                f"are {', '.join(config.labels[:3])} and so on; give data with its labels, or train from random weights"
            )
        return [label_of[name] for name in names]
    if not category_ids or min(category_ids) < 0 or max(category_ids) >= config.num_labels:
        raise UserError(
            f"{source}: does not name its {config.num_labels} labels, and the data's are category numbers up to "
            f"{max(category_ids, default=0)}: name them by id2label in its config.json, or train from random weights"
        )
    log.warning("%s names no labels: taken as COCO's category numbers, %s is %d", source, names[0], category_ids[0])
    return list(category_ids)
