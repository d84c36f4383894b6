"""On a GPU: gradient steps by CUDA graphs against the same steps on a CPU, and what a checkpoint brings back."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from agents.ddpg import DDPG, DDPGConfig
from agents.replay_training import Learner
from agents.sac import SAC, SACConfig
from agents.td3 import TD3, TD3Config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
D, A = 3, 1  # Pendulum-v1
SIZES: dict[str, Any] = {"env": "Pendulum-v1", "hidden": (32, 32), "batch_size": 64, "learning_starts": 100}
CASES = {
    "ddpg": (DDPG, DDPGConfig(**SIZES, critic_layer_norm=True)),
    "td3": (TD3, TD3Config(**SIZES, lr_schedule="linear", steps=1000)),
    "sac": (SAC, SACConfig(**SIZES)),
}


def play(learner: Learner, steps: int) -> dict[str, float]:
    """Random transitions instead of an environment's, and the gradient steps that they allow."""
    rng = np.random.default_rng(learner.env_steps)
    rows_KW = rng.normal(size=(steps, 2 * D + A + 2)).astype(np.float32)
    rows_KW[:, D : D + A] = rng.uniform(-1, 1, (steps, A))
    rows_KW[:, D + A + 1] = 0.99
    learner.replay.add(rows_KW)
    learner.env_steps += steps
    return learner.learn()


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().cpu().ravel() for network in learner.networks.values() for p in network.parameters()])


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_learns_what_a_cpu_learns(name: str) -> None:
    cls, config = CASES[name]
    on_cpu, on_gpu = cls(config, 0, "cpu"), cls(config, 0, "cuda")
    begin = weights(on_cpu)
    assert torch.equal(weights(on_gpu), begin)
    for _ in range(6):
        expected, found = play(on_cpu, 25), play(on_gpu, 25)
        for figure, value in expected.items():
            assert found[figure] == pytest.approx(value, rel=0.01, abs=1e-3), figure
    moved = (weights(on_cpu) - begin).abs().mean()
    assert (weights(on_gpu) - weights(on_cpu)).abs().mean() < 0.01 * moved
    assert np.allclose(on_gpu.snapshot().weights, on_cpu.snapshot().weights, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_brings_back_what_graphs_need(name: str) -> None:
    cls, config = CASES[name]
    whole = cls(config, 0, "cuda")
    play(whole, 150)
    resumed = cls(config, 1, "cuda")
    resumed.seed = whole.seed
    resumed.load_state(copy.deepcopy(whole.state()))
    resumed.replay.add(whole.replay.between(0, 150))
    for _ in range(3):
        play(whole, 20)
        play(resumed, 20)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-5)
