"""One step of the UNet at Stable Diffusion v1's size, beside diffusers' with the same weights.

python -m benchmarks.diffusion_speed                    # on a GPU: bfloat16, batches of 1 and 16, about two minutes
python -m benchmarks.diffusion_speed --size toy         # anywhere, in seconds

Both run in one process, in turns, under each of the settings that diffusers documents: as they are, with channels last,
compiled with channels last and fused projections: theirs by `fuse_qkv_projections` and `reduce-overhead`, ours by
fused_unet.py, which reads the text once for all steps, and graphed_unet.py. The ratio is between the best setting of
each; above 1 we are faster. Prints each figure when it is known, and writes what it has if it is cut short.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import end_in_order, write_result
from models.diffusion.config import UNetConfig
from models.diffusion.fused_unet import fuse
from models.diffusion.graphed_unet import GraphedUNet
from models.diffusion.unet import UNet

RESULTS = Path(__file__).parent / "results" / "diffusion_speed.json"
TEXT_TOKENS = 77
TOY = UNetConfig(
    sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64, layers_per_block=1,
)  # fmt: skip
SETTINGS: dict[str, dict[str, bool]] = {
    "eager": {},
    "channels last": {"channels_last": True},
    "compiled": {"channels_last": True, "compiled": True},
}


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["sd_v1", "toy"], default="sd_v1")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring each setting")
    parser.add_argument("--eager-only", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    config = UNetConfig.sd_v1() if arguments.size == "sd_v1" else TOY
    ours: dict[str, Any] = {"size": arguments.size, "dtype": str(dtype), "matrix_tflops": peak_tflops(device, dtype)}
    print(f"matrix product of {dtype}: {ours['matrix_tflops']:.1f} TFLOP/s")
    peer: dict[str, Any] = {}
    ratio: dict[str, float] = {}
    try:
        for batch in arguments.batches:
            compare(config, batch, device, dtype, arguments, ours, peer, ratio)
    finally:
        write_result(arguments.out, "UNet step", ours, peer, ratio)


def compare(
    config: UNetConfig, batch: int, device: str, dtype: torch.dtype, arguments: argparse.Namespace,
    ours: dict[str, Any], peer: dict[str, Any], ratio: dict[str, float],
) -> None:  # fmt: skip
    """Fill in one batch size."""
    side = config.sample_size or 64
    x = torch.randn(batch, config.in_channels, side, side, device=device, dtype=dtype)
    context = torch.randn(batch, TEXT_TOKENS, config.cross_attention_dim, device=device, dtype=dtype)
    time_at = torch.tensor(500, device=device)
    our_unet = UNet(config).to(device, dtype).eval().requires_grad_(False)
    flops = count_flops(our_unet, x, time_at, context)
    their_unet = diffusers_unet(config, our_unet)
    fastest: dict[str, float] = {}
    for setting, options in SETTINGS.items():
        if options.get("compiled") and arguments.eager_only:
            continue
        for who, unet in (("ours", our_unet), ("diffusers", their_unet)):
            if unet is None:
                continue
            step = prepare(unet, who == "ours", x, time_at, context, **options)
            milliseconds = measure(step, device, arguments.seconds)
            share = flops / milliseconds / 1e9 / ours["matrix_tflops"]
            print(
                f"batch {batch}, {setting}, {who}: {milliseconds:.2f} ms, {share:.0%} of the matrix product", flush=True
            )
            (ours if who == "ours" else peer)[f"ms/batch_{batch}/{setting}"] = milliseconds
            if milliseconds < fastest.get(who, float("inf")):
                fastest[who] = milliseconds
                if who == "ours":
                    ours[f"matrix_share/batch_{batch}"] = share
    if "diffusers" in fastest:
        ratio[f"batch_{batch}"] = fastest["diffusers"] / fastest["ours"]
        print(f"batch {batch}: {ratio[f'batch_{batch}']:.2f} times diffusers' speed", flush=True)
    torch._dynamo.reset()
    del our_unet, their_unet
    gc.collect()


def diffusers_unet(config: UNetConfig, ours: UNet) -> nn.Module | None:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        print("diffusers is not installed: without the peer")
        return None
    settings = {key: value for key, value in config.to_json().items() if not key.startswith("_")}
    weight = ours.conv_in.weight
    theirs = UNet2DConditionModel(**settings).to(weight.device, weight.dtype).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def prepare(
    unet: Any, is_ours: bool, x: torch.Tensor, time_at: torch.Tensor, context: torch.Tensor,
    channels_last: bool = False, compiled: bool = False,
) -> Callable[[], Any]:  # fmt: skip
    """A function that makes one step. compiled: fused projections and CUDA graphs (theirs by `reduce-overhead`)."""
    if compiled and is_ours:
        fuse(unet)
        context = unet.read(context)
    elif compiled:
        unet.fuse_qkv_projections()
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    if is_ours:
        run: Any = GraphedUNet(torch.compile(unet, fullgraph=True)) if compiled and x.is_cuda else unet
        return lambda: run(x, time_at, context)
    run = torch.compile(unet, mode="reduce-overhead", fullgraph=True) if compiled else unet
    return lambda: run(x, time_at, encoder_hidden_states=context, return_dict=False)[0]


@torch.no_grad()
def measure(step: Callable[[], Any], device: str, seconds: float) -> float:
    """Median milliseconds of a step."""

    def once() -> float:
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3

    for _ in range(4):  # the first compiles, the second and third capture the graph
        once()
    durations = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(durations) < 3:
        durations.append(once())
    return statistics.median(durations)


@torch.no_grad()
def count_flops(unet: UNet, x: torch.Tensor, time_at: torch.Tensor, context: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        unet(x, time_at, context)
    return counter.get_total_flops()


def peak_tflops(device: str, dtype: torch.dtype) -> float:
    """Of a large matrix product on this machine."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, device, 1.0) / 1e9


if __name__ == "__main__":
    main()
