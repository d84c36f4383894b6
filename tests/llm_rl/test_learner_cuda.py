"""The learner on a GPU: its micro-batches follow one another without waiting for results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_rl import learner as learner_module
from llm_rl.batch import Sample
from llm_rl.config import LearnerConfig, RLConfig
from llm_rl.learner import Learner
from models.language.checkpoint import save_pretrained
from models.language.decoder import Decoder
from tests.models.language.policies import HYBRID

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAMPLES = [
    Sample(list(range(5, 25 + i)), list(range(40, 70 - i)), [-4.0] * (30 - i), (-1.0) ** i, i // 4) for i in range(12)
]


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    save_pretrained(Decoder(replace(HYBRID, head_dim=32)).init_weights(0), tmp_path)
    return Learner(tmp_path, LearnerConfig(dtype="bfloat16", tokens_per_microbatch=200, threads=1), "cuda")


def waiting_is_an_error(patch: pytest.MonkeyPatch, learner: Learner) -> None:
    """From the first comparison with the sampler, or from now on, until the optimizer's step."""

    def compare(*arguments: Any) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("default")
        figures = plain(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return figures

    def step(*_: Any) -> float:
        torch.cuda.set_sync_debug_mode("default")
        return 1.0

    plain = learner_module.mismatch
    patch.setattr(learner_module, "mismatch", compare)
    patch.setattr(learner, "_step", step)


@pytest.mark.parametrize("phase", ["sft", "rl"])
def test_no_microbatch_waits(phase: str, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, float]:
        if phase == "sft":
            return learner.sft_step(SAMPLES, 1e-4, 1)
        return learner.iterate(SAMPLES, RLConfig(minibatches=1), 1e-4, 0, 1)

    run()  # compiles
    waiting_is_an_error(monkeypatch, learner)
    try:
        if phase == "sft":
            torch.cuda.set_sync_debug_mode("error")
        figures = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value == value for value in figures.values())
