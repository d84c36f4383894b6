from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launch.local_group import LocalGroup
from llm_rl import weights
from llm_rl.config import LearnerConfig, ReasonConfig
from llm_rl.learner import Learner
from llm_rl.session import Session
from llm_rl.weights import export, tensors
from models.errors import UserError
from models.language.checkpoint import save_pretrained, to_checkpoint
from models.language.decoder import Decoder
from tests.models.language.policies import HYBRID


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


def test_memory_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "gpu", lambda: "GPU-1")
    with pytest.raises(UserError, match=r"anew on another GPU.*longstride resume"):
        dict(tensors({weights.HANDLE: (), weights.GPU: "GPU-0", "layout": []}))


@pytest.mark.parametrize(("second", "offer"), [("GPU-0", "weights"), ("GPU-1", "weights_on_host")])
def test_weights_go_by_the_host_where_gpus_differ(second: str, offer: str) -> None:
    class Actor:
        def __init__(self, where: str) -> None:
            self.where = where

        def gpu(self) -> str:
            return self.where

    session = Session.__new__(Session)
    session.config, session.run = ReasonConfig(), SimpleNamespace(device="cuda")
    session.learner = LocalGroup(Actor, 1, ("GPU-0",), {})
    session.workers = LocalGroup(Actor, 2, (second,), {})
    assert session._transport() == offer


def test_weights_on_the_host_are_the_learners(tmp_path: Path) -> None:
    model = Decoder(HYBRID).init_weights(0)
    save_pretrained(model, tmp_path)
    offered = dict(tensors(Learner(tmp_path, LearnerConfig(threads=1), "cpu").weights_on_host()))
    assert all(torch.equal(offered[name], tensor) for name, tensor in to_checkpoint(model))
