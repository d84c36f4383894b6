"""A published detector has 91 labels, COCO's category numbers; the data has its 80 categories as labels 0 to 79."""

from dataclasses import replace

import pytest
import torch

from models.detr.detr import Detr
from models.detr.labels import with_labels
from models.errors import UserError
from tests.models.detr.small import SMALL

NAMES = ("ant", "bee", "cat")
NUMBERS = [1, 2, 5]  # with gaps, as COCO's have
PUBLISHED = replace(SMALL, mask_head=False, num_labels=6, labels=("N/A", "ant", "bee", "N/A", "N/A", "cat"))


def head_of(**changes: object) -> tuple[Detr, Detr]:
    """A detector, and the same with the data's labels."""
    config = replace(PUBLISHED, **changes)  # type: ignore[arg-type]
    plain, mapped = Detr(config).eval(), Detr(config).eval()
    mapped.load_state_dict(plain.state_dict())
    return plain, with_labels(mapped, NAMES, NUMBERS, "file")


@pytest.mark.parametrize("labels", [PUBLISHED.labels, ()])
def test_labels_by_name_or_by_category_number(labels: tuple[str, ...]) -> None:
    plain, mapped = head_of(labels=labels)
    assert mapped.config.labels == NAMES
    assert mapped.config.num_labels == 3
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, after = plain(images), mapped(images)
    torch.testing.assert_close(after.logits_BQC, before.logits_BQC[..., [*NUMBERS, 6]])
    torch.testing.assert_close(after.boxes_BQ4, before.boxes_BQ4)


def test_as_many_labels_in_another_order_are_put_in_the_datas() -> None:
    plain, mapped = head_of(num_labels=3, labels=NAMES[::-1])
    torch.testing.assert_close(mapped.class_embed.weight, plain.class_embed.weight[[2, 1, 0, 3]])


def test_what_it_does_not_know_is_named() -> None:
    with pytest.raises(UserError, match=r"file: knows no label 'bee', which the data has \(2 such in all\)"):
        head_of(num_labels=1, labels=("ant",))
    with pytest.raises(UserError, match="does not name its 5 labels, and the data's are category numbers up to 5"):
        head_of(num_labels=5, labels=())
