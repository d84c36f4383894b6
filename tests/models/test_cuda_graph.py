"""On a GPU: a recorded function against the function itself."""

import pytest
import torch
from torch import Tensor

from models.cuda_graph import record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_replays_with_new_inputs_and_keeps_what_it_returned() -> None:
    def double(x: Tensor) -> dict[str, Tensor]:
        return {"doubled": 2 * x}

    recorded = record(double, torch.zeros(3, device="cuda"))
    one, two = torch.ones(3, device="cuda"), torch.full((3,), 2.0, device="cuda")
    first = recorded(one)["doubled"]
    assert recorded(two)["doubled"].tolist() == [4, 4, 4]
    assert first.tolist() == [2, 2, 2]
    assert one.tolist() == [1, 1, 1]  # an input is copied, not kept


def test_recording_changes_nothing_and_replays_write_where_the_function_writes() -> None:
    weight = torch.zeros((), device="cuda")

    def step(gradient: Tensor) -> dict[str, Tensor]:
        weight.sub_(gradient)
        return {"weight": weight}

    recorded = record(step, torch.ones((), device="cuda"))
    assert weight.item() == 0
    for expected in (-1, -2):
        assert recorded(torch.ones((), device="cuda"))["weight"].item() == weight.item() == expected
