"""How far the mixtures and the folders are from oracles that others wrote: largest absolute differences in float32.

python -m benchmarks.moe_oracles

The tests hold the limits (1e-5 forward, 1e-4 gradients); this prints what is measured, as a table for docs/.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.record import write_result
from models.language.checkpoint import load_pretrained, save_pretrained
from models.language.packing import Packing
from tests.models.language.oracles import ORACLES, oracle_model
from tests.models.language.test_checkpoint import LENGTHS, alone, pack
from tests.models.language.test_moe import KINDS, loop, mixture


@dataclasses.dataclass
class Config:
    output: Path = Path("benchmarks/results/moe_oracles.json")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    rows = [(f"mixture, {kind}", "float64 loop over tokens and experts", *against_loop(kind)) for kind in KINDS]
    for family in ORACLES:
        forward, gradients, again = against_transformers(family)
        rows.append((f"{family} folder, read", "transformers", forward, gradients))
        rows.append((f"{family} folder, written", "transformers reads it", again, None))
    print("| block | oracle | forward | gradients |\n|---|---|---|---|")
    for block, oracle, forward, gradient in rows:
        print(f"| {block} | {oracle} | {forward:.1e} | {'' if gradient is None else f'{gradient:.1e}'} |")
    names = ("block", "oracle", "forward", "gradients")
    write_result(config.output, "moe_oracles", [dict(zip(names, row, strict=True)) for row in rows])


def worst(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs if a is not None and b is not None)


def against_loop(kind: str) -> tuple[float, float]:
    moe, reference = mixture(**KINDS[kind]), mixture(**KINDS[kind]).double()
    x_TD = torch.randn(50, 64, requires_grad=True)
    x64_TD = x_TD.detach().double().requires_grad_()
    ours, theirs = moe(x_TD, None), loop(reference, x64_TD)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    gradients = [x_TD.grad, *(p.grad for p in moe.parameters())]
    return worst([ours], [theirs]), worst(gradients, [x64_TD.grad, *(p.grad for p in reference.parameters())])


def against_transformers(family: str) -> tuple[float, float, float]:
    oracle, (tokens_T, _) = oracle_model(family), pack()
    with tempfile.TemporaryDirectory() as name:
        oracle.save_pretrained(f"{name}/theirs")
        model = load_pretrained(f"{name}/theirs")
        save_pretrained(model, f"{name}/ours")
        again = AutoModelForCausalLM.from_pretrained(f"{name}/ours")
    assert type(again) is type(oracle)
    ours, theirs = model.logits(model(tokens_T, Packing.of(LENGTHS))), alone(oracle, tokens_T)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / len(tokens_T)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    named = {name if name.startswith("lm_head") else f"model.{name}": p.grad for name, p in model.named_parameters()}
    expected = {name.replace("shared_experts", "shared_expert"): p.grad for name, p in oracle.named_parameters()}
    assert named.keys() == expected.keys()
    gradients = worst([named[name] for name in expected], list(expected.values()))
    return worst([ours], [theirs]), gradients, worst([alone(again, tokens_T)], [theirs])


if __name__ == "__main__":
    main(tyro.cli(Config))
