"""DETR-R50 inference, images a second at 800×1066 in bfloat16, ours against transformers' with the same weights.

python -m benchmarks.detr_speed                            # on the GPU
python -m benchmarks.detr_speed --toy                      # to see that it runs, on the CPU

Ours: the fused backbone (models/detr/fused_resnet.py), torch.compile. Theirs: SDPA attention (its
default), plain, channels last, and with torch.compile in the same mode; the fastest of these counts. Images are padded
as a real batch is (one of them is smaller), and theirs gets the same mask. Each compilation takes most of a minute.
Writes what it has if it is cut short.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks.record import end_in_order, write_result
from models.detr.checkpoint import load_detr, save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.detr.fused_resnet import fuse

COMPILED = "reduce-overhead"  # with CUDA graphs


@dataclasses.dataclass
class Config:
    batch_sizes: tuple[int, ...] = (8, 1)
    height: int = 800
    width: int = 1066
    seconds: float = 3.0
    """Of measuring, for each entry."""
    toy: bool = False
    output: Path = Path("benchmarks/results/detr_speed.json")


def main(config: Config) -> None:
    end_in_order()
    device = "cpu" if config.toy else "cuda"
    dtype = torch.float32 if config.toy else torch.bfloat16
    shape = DetrConfig()
    if config.toy:
        config = dataclasses.replace(config, batch_sizes=(2,), height=96, width=128, seconds=0.3)
        shape = DetrConfig(encoder_layers=1, decoder_layers=1, backbone=ResNetConfig("basic", (1, 1), (64, 128)))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_detr(Detr(shape), folder)
        rivals = {"ours": ours(folder, dtype, device, not config.toy)}
        rivals |= peers(folder, dtype, device, not config.toy)
    flops = flops_of(shape, config.height, config.width, device)
    peak = matmul_flops(device, dtype)
    print(f"matrix peak {peak / 1e12:.1f} TFLOP/s; one image {flops / 1e9:.1f} GFLOP", flush=True)
    results: dict[str, dict[str, Any]] = {}
    try:
        measure(config, rivals, results, flops, peak, device, dtype)
    finally:
        record = {**results.get("ours", {}), "matrix_peak_tflops": peak / 1e12, "gflop_per_image": flops / 1e9}
        peer = {name: figures for name, figures in results.items() if name != "ours"}
        ratio = {
            key: round(speed / max(figures[key] for figures in peer.values()), 3)
            for key, speed in results.get("ours", {}).items()
            if key.startswith("images_per_s") and peer and all(key in figures for figures in peer.values())
        }
        write_result(config.output, "detr_speed", record, peer, ratio)
        print(json.dumps(ratio))


def measure(
    config: Config,
    rivals: "dict[str, Forward]",
    results: dict[str, dict[str, Any]],
    flops: float,
    peak: float,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Fill in the results."""
    for batch in config.batch_sizes:
        images = torch.randn(batch, 3, config.height, config.width, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        valid = torch.ones(batch, config.height, config.width, device=device, dtype=torch.bool)
        valid[0, :, config.width * 3 // 4 :] = False
        answers = {}
        for name, forward in rivals.items():
            answers[name] = forward(images, valid)
            speed = batch / seconds_of(partial(forward, images, valid), config.seconds, device)
            results.setdefault(name, {})[f"images_per_s/batch_{batch}"] = round(speed, 1)
            results[name][f"share_of_peak/batch_{batch}"] = round(speed * flops / peak, 3)
            print(json.dumps({"batch": batch, "rival": name, **results[name]}), flush=True)
        check(answers)


Forward = Callable[[Tensor, Tensor], Tensor]


def ours(folder: str, dtype: torch.dtype, device: str, compiled: bool) -> Forward:
    model = load_detr(folder)
    fuse(model.backbone)
    model = model.to(device, dtype).eval()
    network: Any = torch.compile(model, mode=COMPILED, dynamic=False) if compiled else model

    @torch.no_grad()
    def forward(images: Tensor, valid: Tensor) -> Tensor:
        return network(images, valid).boxes_LBQ4[-1].clone()  # of a CUDA graph's own memory

    return forward


def peers(folder: str, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Forward]:
    from transformers import DetrForObjectDetection

    def make(channels_last: bool, compiled: bool) -> Forward:
        model = DetrForObjectDetection.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval()
        if channels_last:
            _channels_last(model)
        network: Any = torch.compile(model, mode=COMPILED, dynamic=False) if compiled else model

        @torch.no_grad()
        def forward(images: Tensor, valid: Tensor) -> Tensor:
            return network(images, valid.long()).pred_boxes.clone()

        return forward

    rivals = {"peer": make(False, False), "peer, channels last": make(True, False)}
    return rivals | {"peer, compiled": make(True, True)} if compiled else rivals


def _channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def check(answers: dict[str, Tensor]) -> None:
    """Boxes, in parts of the image: the rivals compute the same up to bfloat16."""
    for name, boxes in answers.items():
        worst = (boxes.float() - answers["peer"].float()).abs().max().item()
        if worst > 0.05:
            raise SystemExit(f"{name} differs from transformers by {worst:.3f} of the image: nothing to compare")


def seconds_of(run: Callable[[], Any], budget_s: float, device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        run()
    wait()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < budget_s:
        for _ in range(5):
            run()
        wait()
        count += 5
    return elapsed / count


def flops_of(config: DetrConfig, height: int, width: int, device: str) -> float:
    """Of the convolutions and matrix products of one image, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = Detr(config).to(device).eval(), torch.empty(1, 3, height, width, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return float(counter.get_total_flops())


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large matrix product."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: a @ a, 1.0, device)


if __name__ == "__main__":
    main(tyro.cli(Config))
