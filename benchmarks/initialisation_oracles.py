"""How far norm placements and attention scalings are from others' layers: largest absolute differences in float32.

python -m benchmarks.initialisation_oracles

The tests hold the limits (1e-5 forward, 1e-4 gradients); this prints what is measured, as a table for docs/.
"""

import dataclasses
from pathlib import Path

import torch
import tyro

from benchmarks.record import write_result
from tests.models.language.layer_oracles import differences
from tests.models.language.test_norm import from_its_equation
from tests.models.language.test_query_scale import against_t5


@dataclasses.dataclass
class Config:
    output: Path = Path("benchmarks/results/initialisation_oracles.json")


def main(config: Config) -> None:
    torch.set_num_threads(1)
    rows: list[tuple[str, str, float, float | None]] = [
        ("pre-norm layer, LayerNorm", "torch.nn.TransformerEncoderLayer", *differences("pre")),
        ("post-norm layer, LayerNorm", "torch.nn.TransformerEncoderLayer", *differences("post")),
        ("sandwich layer, RMSNorm", "transformers' Gemma2DecoderLayer", *differences("sandwich")),
        ("DeepNorm layer, LayerNorm", "its equation in float64", from_its_equation("deepnorm", "layer_norm"), None),
        ("layer with gates", "its equation in float64", from_its_equation("none", "rms_norm"), None),
        ("attention without division", "transformers' T5Attention", *against_t5("none")),
    ]
    print("| block | oracle | forward | gradients |\n|---|---|---|---|")
    for block, oracle, forward, gradient in rows:
        print(f"| {block} | {oracle} | {forward:.1e} | {'' if gradient is None else f'{gradient:.1e}'} |")
    names = ("block", "oracle", "forward", "gradients")
    write_result(config.output, "initialisation_oracles", [dict(zip(names, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Config))
