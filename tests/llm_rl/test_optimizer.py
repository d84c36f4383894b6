"""MasterAdamW: torch's AdamW in float32, and no lost updates in bfloat16."""

from typing import Any

import pytest
import torch
from torch import nn

from llm_rl.optimizer import MasterAdamW, cosine


def named(dtype: torch.dtype, device: str = "cpu") -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    values = {"matrix": torch.randn(4, 3), "bias": torch.randn(3)}
    return {name: nn.Parameter(value.to(device, dtype)) for name, value in values.items()}


def run_steps(parameters: dict[str, nn.Parameter], optimizer: MasterAdamW, steps: int, lr: float) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.gather()
        optimizer.step(lr)


def test_float32_equals_torch() -> None:
    ours, theirs = named(torch.float32), named(torch.float32)
    run_steps(ours, MasterAdamW(ours, (0.9, 0.95), 0.1), 5, 1e-2)
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["bias"]], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in theirs.values():
            p.grad = torch.randn(p.shape, generator=generator)
        adam.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


def test_learning_rate_multipliers() -> None:
    plain, scaled = named(torch.float32), named(torch.float32)
    start = {name: p.detach().clone() for name, p in plain.items()}
    run_steps(plain, MasterAdamW(plain, (0.9, 0.95), 0.0), 1, 1e-2)
    run_steps(scaled, MasterAdamW(scaled, (0.9, 0.95), 0.0, {"matrix": 16.0}), 1, 1e-2)
    for name, factor in (("matrix", 16), ("bias", 1)):
        torch.testing.assert_close(
            scaled[name] - start[name], factor * (plain[name] - start[name]), atol=1e-6, rtol=1e-4
        )


def test_bfloat16_keeps_updates_smaller_than_its_mantissa() -> None:
    parameter = nn.Parameter(torch.full((8, 8), 100.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": parameter}, (0.9, 0.95), 0.0)
    for _ in range(2000):  # each step moves by 1e-3; the spacing of bfloat16 at 100 is 0.5
        parameter.grad = torch.ones_like(parameter)
        optimizer.gather()
        optimizer.step(1e-3)
    assert optimizer.masters["w"].dtype == torch.float32
    assert parameter.float().mean().item() == pytest.approx(98.0, abs=0.3)


def test_gradients_of_microbatches_add_up_in_the_master() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": parameter}, (0.9, 0.95), 0.0)
    for value in (256.0, 0.25):  # their bfloat16 sum would be 256
        parameter.grad = torch.full_like(parameter, value)
        optimizer.gather()
    assert optimizer.masters["w"].grad is not None
    assert (optimizer.masters["w"].grad == 256.25).all()
    assert parameter.grad is None


def on_host(tree: Any) -> Any:
    """A copy of an optimizer's state, as a checkpoint has it."""
    if isinstance(tree, dict):
        return {key: on_host(value) for key, value in tree.items()}
    return tree.cpu().clone()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    straight = named(dtype, device)
    run_steps(straight, straight_optimizer := MasterAdamW(straight, (0.9, 0.95), 0.1), 3, 1e-2)
    state = on_host(straight_optimizer.state_dict())
    before = on_host(state)
    run_steps(straight, straight_optimizer, 3, 1e-2)
    resumed = {name: nn.Parameter(torch.zeros_like(p)) for name, p in straight.items()}
    optimizer = MasterAdamW(resumed, (0.9, 0.95), 0.1)
    optimizer.load_state_dict(state)
    run_steps(resumed, optimizer, 3, 1e-2)
    for name in straight:
        assert torch.equal(resumed[name], straight[name])
        for key, value in before["moments"][name].items():
            assert torch.equal(state["moments"][name][key], value)  # the steps left what was loaded as it was


def test_everything_restored_lies_where_the_parameter_does() -> None:
    parameters = named(torch.float32)
    run_steps(parameters, saved := MasterAdamW(parameters, (0.9, 0.95), 0.1), 1, 1e-2)
    elsewhere = {name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in parameters.items()}
    optimizer = MasterAdamW(elsewhere, (0.9, 0.95), 0.1)
    optimizer.load_state_dict(saved.state_dict())
    for moments in optimizer.adam.state.values():
        assert {value.device.type for value in moments.values()} == {"meta"}


def test_cosine_warms_up_and_decays() -> None:
    factors = [cosine(step, 100, 10, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert max(factors) <= 1.0
    assert factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
