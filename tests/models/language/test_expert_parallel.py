"""Two gloo processes with half of the experts and half of the sequences each, against one process with everything."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from models.errors import UserError
from models.language.decoder import Decoder
from models.language.expert_parallel import ParallelExperts, distribute_experts
from models.language.lora import attach
from models.language.lora_layers import LoraConfig
from models.language.packing import Packing
from tests.models.language.policies import DEEPSEEK, MOE

LENGTHS = ((20, 3), (31,))  # of the sequences of each process
CASES = {
    "moe": MOE,
    "deepseek": DEEPSEEK,
    "capacity": replace(MOE, expert_capacity_factor=4.0),  # room enough for all, so that nothing depends on the batch
}


def scored(model: Decoder, tokens_T: torch.Tensor, lengths: tuple[int, ...], direction: torch.Tensor) -> torch.Tensor:
    logits_TV = model.logits(model(tokens_T, Packing.of(lengths)))
    (logits_TV * direction).sum().backward()
    return logits_TV.detach()


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for case, config in CASES.items():
            check(case, config, rank)
        check("one process has all the work", DEEPSEEK, rank, lopsided=True)
        with pytest.raises(UserError, match=r"2 processes do not divide num_experts \(5\)"):
            distribute_experts(Decoder(replace(MOE, num_experts=5)), dist.group.WORLD)
        adapted = Decoder(MOE)
        attach(adapted, LoraConfig(r=4, targets=("experts.down_proj",)), seed=0)
        with pytest.raises(UserError, match="fold the adapters first"):
            distribute_experts(adapted, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def check(case: str, config: object, rank: int, lopsided: bool = False) -> None:
    whole, mine = Decoder(config).init_weights(0), Decoder(config).init_weights(0)
    if lopsided:  # all choices fall on the experts of process 0
        for model in (whole, mine):
            for bias in model.buffers():
                bias[:4] = 9.0
    distribute_experts(mine, dist.group.WORLD)
    lengths = LENGTHS[0] + LENGTHS[1]
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(0, 97, (sum(lengths),), generator=generator)
    direction = torch.randn(sum(lengths), 97, generator=generator) / sum(lengths)
    begin = sum(LENGTHS[0]) * rank
    rows = slice(begin, begin + sum(LENGTHS[rank]))

    expected = scored(whole, tokens_T, lengths, direction)[rows]
    ours = scored(mine, tokens_T[rows], LENGTHS[rank], direction[rows])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0, msg=lambda text: f"{case}: {text}")
    reference = dict(whole.named_parameters())
    shares = 0
    for name, parameter in mine.named_parameters():
        expected = reference[name].grad
        if ".experts." in name:
            share = len(parameter)
            expected = expected[rank * share : (rank + 1) * share]
            shares += 1
        else:
            dist.all_reduce(parameter.grad)
        assert parameter.grad is not None, f"{case}: {name}"
        torch.testing.assert_close(
            parameter.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{case}, {name}: {text}"
        )
    assert shares == 2 * sum(isinstance(module, ParallelExperts) for module in mine.modules()) > 0


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
