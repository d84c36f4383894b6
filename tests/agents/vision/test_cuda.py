"""On a GPU: what a training step of a detector costs the host, and that CUDA graphs change nothing."""

import warnings
from dataclasses import replace

import pytest
import torch

from agents.vision.detr_learner import DetrLearner, NetworkConfig, OptimizerConfig
from envs.vision.example import Batch, collate
from envs.vision.scenes import SceneConfig
from envs.vision.sources import SceneSource
from models.detr.loss import SetLossConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SOURCE = SceneSource(SceneConfig(), 0, "train")


def batch(number: int) -> Batch:
    return collate([SOURCE.example(i) for i in range(8 * number, 8 * number + 8)])


def learner(optimizer: OptimizerConfig) -> DetrLearner:
    network = NetworkConfig(masks=True, queries=16)
    return DetrLearner(None, SOURCE.names, network, SetLossConfig(), optimizer, 100, 0, "cuda")


def test_a_step_waits_for_the_gpu_once() -> None:
    """For the costs of matching."""
    pupil = learner(OptimizerConfig(dense_weight=1.0, precision="bfloat16"))
    pupil.update(batch(0), want_metrics=False)  # constants are made, memory is pinned
    following = batch(1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pupil.update(following, want_metrics=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]


def test_cuda_graphs_learn_the_same() -> None:
    plain = OptimizerConfig(dense_weight=1.0, compile=True)
    losses = []
    for settings in (plain, replace(plain, cuda_graphs=True)):
        pupil = learner(settings)
        losses.append([pupil.update(batch(n), want_metrics=True)["train/loss"] for n in range(8)])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
