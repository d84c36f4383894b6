"""How far our adapters are from peft's: largest absolute differences in float32, with adapters that do something.

python -m benchmarks.lora_oracles

The tests hold the limits (1e-5 forward and merged, 1e-4 gradients); this prints what is measured, as a table for docs/.
`read by peft`: logits of peft with our folder against ours. `merged`: weights after merging on both sides. Gradients
are those of one token's mean log-probability; a PiSSA folder is plain LoRA of another rank, so peft has none of it.
"""

import dataclasses
import tempfile
from pathlib import Path

import peft
import torch
import tyro
from transformers import AutoModelForCausalLM

from benchmarks.record import write_result
from models.language.checkpoint import read_tensors, save_pretrained, to_checkpoint
from models.language.decoder import Decoder
from models.language.lora import parts
from models.language.packing import Packing
from models.language.peft_folder import adapter_tensors, save_adapter
from tests.models.language.test_lora import FAMILY, TOKENS, trained


@dataclasses.dataclass
class Config:
    output: Path = Path("benchmarks/results/lora_oracles.json")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    rows = [{"adapter": kind, **compare(kind)} for kind in FAMILY]
    print("| adapter | read by peft | merged | gradients |\n|---|---|---|---|")
    for row in rows:
        cells = [row["adapter"], *("" if v is None else f"{v:.1e}" for v in list(row.values())[1:])]
        print(f"| {' | '.join(map(str, cells))} |")
    write_result(config.output, "lora_oracles", rows)


def compare(kind: str) -> dict[str, float | None]:
    policy, lora = FAMILY[kind]
    model = trained(policy, lora)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pretrained(Decoder(policy).init_weights(0), folder / "base")
        save_adapter(model, folder / "adapter")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    ours, expected = model.logits(model(TOKENS, Packing.of([len(TOKENS)]))), theirs(TOKENS[None]).logits[0]
    forward = difference(ours, expected)
    ours.log_softmax(-1)[:, 5].mean().backward()
    expected.log_softmax(-1)[:, 5].mean().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as name:  # through a folder, where experts have their names
        theirs.merge_and_unload().save_pretrained(name)
        whole = dict(read_tensors(name))
    worst_merged = max(difference(tensor, whole[n]) for n, tensor in to_checkpoint(model))
    with torch.no_grad():  # gradients in the place of the tensors get peft's names and layout
        for _, _, adapter in parts(model, "default"):
            for parameter in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude):
                if parameter is not None and parameter.grad is not None:
                    parameter.copy_(parameter.grad)
    worst_gradient = None
    if lora.init != "pissa":
        names = {n: n if n in gradients else f"{n}.weight" for n, _ in adapter_tensors(model)}
        worst_gradient = max(difference(t, gradients[names[n]]) for n, t in adapter_tensors(model))
    return {"read by peft": forward, "merged": worst_merged, "gradients": worst_gradient}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.detach().double() - theirs.detach().double()).abs().max().item()


if __name__ == "__main__":
    main(tyro.cli(Config))
