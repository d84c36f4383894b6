import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from agents.adam import Adam

COMMANDS = """
import sys
from launch.cli import main

everywhere = ["--backend", "local", "--eval-every", "256", "--eval-episodes", "1", "--runs-dir", sys.argv[1]]
on_policy = ["--env", "CartPole-v1", "--steps", "512"]
replay = ["--env", "Pendulum-v1", "--steps", "256", "--learning-starts", "128", "--hidden", "8", "--batch-size", "8"]
jobs = dict.fromkeys(["qac", "a2c", "ppo", "trpo", "offpac"], on_policy) | dict.fromkeys(["ddpg", "td3", "sac"], replay)
for job, options in jobs.items():
    assert main(["train", job, *options, *everywhere, "--name", job]) == 0, job
    assert main(["evaluate", job, "--runs-dir", sys.argv[1]]) == 0, job
    assert "torch._dynamo" not in sys.modules, f"{job} imports the compiler"
"""


def step(optimizer: torch.optim.Optimizer, network: nn.Module, inputs: Tensor) -> None:
    optimizer.zero_grad()
    network(inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_is_torchs_adam_bit_for_bit(fused: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.1, "eps": 1e-5, "fused": fused}
    adam, peer = Adam(ours.parameters(), **options), torch.optim.Adam(theirs.parameters(), **options)
    inputs = torch.randn(6, 4, 5)
    for batch in inputs[:3]:
        step(adam, ours, batch)
        step(peer, theirs, batch)
    states = adam.state_dict(), peer.state_dict()  # each goes on from what the other saved
    adam.load_state_dict(states[1])
    peer.load_state_dict(states[0])
    for batch in inputs[3:]:
        step(adam, ours, batch)
        step(peer, theirs, batch)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_no_agent_waits_for_the_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMANDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
