"""The peer's recorded gradient step learns what its own train() learns."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.noise import NormalActionNoise

from benchmarks import sb3_recorded
from benchmarks.sb3_recorded import RecordedDDPG

SETTINGS: dict[str, Any] = {"buffer_size": 2000, "learning_starts": 100, "batch_size": 64, "seed": 3}
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without a GPU the function that would be recorded is called each time."""
    if request.param == "cpu":
        monkeypatch.setattr(sb3_recorded, "ADAM", {"fused": True})
        monkeypatch.setattr(sb3_recorded, "record", lambda function, *given: function)
        monkeypatch.setattr(sb3_recorded, "on_stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    return request.param


def weights(kind: type[DDPG], device: str, adam: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    settings = SETTINGS | {"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)), "device": device}
    network = {"net_arch": [40, 30]} | ({"optimizer_kwargs": adam} if adam else {})
    model = kind("MlpPolicy", "Pendulum-v1", policy_kwargs=network, **settings)
    model.learn(500)
    return {name: value.cpu() for name, value in model.policy.state_dict().items()}


def test_learns_the_same_bit_for_bit(device: str) -> None:
    own, recorded = weights(DDPG, device, sb3_recorded.ADAM), weights(RecordedDDPG, device)
    torch.testing.assert_close(recorded, own, rtol=0, atol=0)
    network = {"net_arch": [40, 30]}
    start = DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs=network, device="cpu", **SETTINGS).policy.state_dict()
    assert not any(torch.allclose(value, start[name], atol=1e-4) for name, value in recorded.items())


@pytest.mark.parametrize("wrong", [{"gradient_steps": 2}, {"learning_rate": lambda remaining: remaining}])
def test_what_a_graph_would_not_follow_is_refused(device: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecordedDDPG("MlpPolicy", "Pendulum-v1", device=device, **SETTINGS | wrong).learn(200)
