import numpy as np
import pytest
import torch

from llm_rl import weights
from llm_rl.weights import export, tensors
from models.errors import UserError


def test_round_trip_keeps_every_bit() -> None:
    torch.manual_seed(0)
    named = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.randn(4, 3).T}
    back = dict(tensors(export(named.items())))
    assert back.keys() == named.keys()
    for name, tensor in named.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_export_is_a_copy_and_read_only_arrays_arrive() -> None:
    source = torch.zeros(3)
    arrays = export([("w", source)])
    source += 1
    for array in arrays.values():
        array.flags.writeable = False  # as the object store hands them out
    ((_, arrived),) = tensors(arrays)
    assert torch.equal(arrived, torch.zeros(3))
    assert isinstance(arrays["w"], np.ndarray)


def test_weights_from_another_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_gpu", lambda: "GPU-1")
    with pytest.raises(UserError, match=r"different GPUs.*--rollout.gpu-share"):
        dict(tensors({weights.HANDLE: (), weights.GPU: "GPU-0", "layout": []}))
