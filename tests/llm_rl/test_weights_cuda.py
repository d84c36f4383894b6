"""Weights from the learner's process to others on one GPU."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from llm_rl.weights import CudaExport, received, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def arrived(offer: dict[str, Any]) -> dict[str, torch.Tensor]:
    copied = {name: tensor.clone() for name, tensor in tensors(offer)}
    received("cuda")
    return {name: tensor.float().cpu() for name, tensor in copied.items()}


def test_each_export_arrives_whole_also_in_processes_that_come_later() -> None:
    named = {"a": torch.randn(1000, 33), "b": torch.randn(7).bfloat16(), "c": torch.randn(5, 3).T}
    named = {name: tensor.cuda() for name, tensor in named.items()}
    export = CudaExport()
    with ProcessPoolExecutor(1, get_context("spawn")) as first, ProcessPoolExecutor(1, get_context("spawn")) as second:
        for readers in ([first], [first, second], [second]):
            for tensor in named.values():
                tensor.mul_(1.5)
            offer = export(named.items())
            for reader in readers:
                for name, tensor in reader.submit(arrived, offer).result(timeout=120).items():
                    assert torch.equal(tensor, named[name].float().cpu()), name
