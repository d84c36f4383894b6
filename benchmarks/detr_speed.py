"""DETR-R50 inference, images a second at 800×1066 in bfloat16, ours against transformers' with the same weights.

python -m benchmarks.detr_speed                            # on the GPU
python -m benchmarks.detr_speed --toy                      # to see that it runs, on the CPU

Ours: frozen batch norms folded into the convolutions, channels last, torch.compile. Theirs: SDPA attention (its
default), plain, channels last, and with torch.compile as its documentation advises; the fastest of these counts. Images
are padded as a real batch is (one of them is smaller), and theirs gets the same mask.
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

from benchmarks.record import write_result
from models.detr.checkpoint import load_detr, save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.detr.resnet import fold_batch_norms


@dataclasses.dataclass
class Config:
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    height: int = 800
    width: int = 1066
    seconds: float = 3.0
    """Of measuring, for each entry."""
    toy: bool = False
    output: Path = Path("benchmarks/results/detr_speed.json")


def main(config: Config) -> None:
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
    flops = flops_of(shape, config.height, config.width)
    peak = matmul_flops(device, dtype)
    print(f"matrix peak {peak / 1e12:.1f} TFLOP/s; one image {flops / 1e9:.1f} GFLOP", flush=True)
    results: dict[str, dict[str, Any]] = {}
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
    key = [f"images_per_s/batch_{batch}" for batch in config.batch_sizes]
    best = {k: max(v[k] for name, v in results.items() if name != "ours") for k in key}
    ratio = {k: round(results["ours"][k] / best[k], 3) for k in key}
    record = {**results["ours"], "matrix_peak_tflops": round(peak / 1e12, 1), "gflop_per_image": round(flops / 1e9, 1)}
    write_result(config.output, "detr_speed", record, {k: v for k, v in results.items() if k != "ours"}, ratio)
    print(json.dumps(ratio))


Forward = Callable[[Tensor, Tensor], Tensor]


def ours(folder: str, dtype: torch.dtype, device: str, compiled: bool) -> Forward:
    model = load_detr(folder)
    fold_batch_norms(model.backbone)
    model = model.to(device, dtype).eval()
    _channels_last(model.backbone)
    network: Any = torch.compile(model, mode="max-autotune") if compiled else model

    @torch.no_grad()
    def forward(images: Tensor, valid: Tensor) -> Tensor:
        return network(images, valid).boxes_LBQ4[-1].clone()  # of a CUDA graph's own memory

    return forward


def peers(folder: str, dtype: torch.dtype, device: str, compiled: bool) -> dict[str, Forward]:
    from transformers import DetrForObjectDetection

    def make(channels_last: bool, mode: str | None) -> Forward:
        model = DetrForObjectDetection.from_pretrained(folder, dtype=dtype)
        model = model.to(device).eval()
        if channels_last:
            _channels_last(model)
        network: Any = torch.compile(model, mode=mode) if mode else model

        @torch.no_grad()
        def forward(images: Tensor, valid: Tensor) -> Tensor:
            return network(images, valid.long()).pred_boxes.clone()

        return forward

    rivals = {"peer": make(False, None), "peer, channels last": make(True, None)}
    if compiled:
        rivals |= {"peer, compiled": make(True, "default"), "peer, max-autotune": make(True, "max-autotune")}
    return rivals


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


def flops_of(config: DetrConfig, height: int, width: int) -> float:
    """Of the convolutions and matrix products of one image, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, images = Detr(config).eval(), torch.empty(1, 3, height, width)
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
