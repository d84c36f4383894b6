"""vLLM's experts on the CPU, in float32."""

import functools
from typing import Any

import torch

ALIGNED = 32  # columns that its kernels take at once


@functools.cache  # once in each process
def serve_float32_beside_amx() -> None:
    """vLLM 0.27 takes its AMX kernel wherever the CPU has AMX, and refuses experts that are not bfloat16 there, naming
    their sizes as the reason. In float32 they get its vector kernel, as on any other CPU."""
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    chosen = cpu_fused_moe.CPUFusedMOE.check_grouped_gemm

    def choose(self: Any, layer: Any) -> tuple[bool, str]:
        if layer.w13_weight.dtype == torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
            return chosen(self, layer)
        aligned = layer.w13_weight.size(1) % ALIGNED == 0 and layer.w2_weight.size(1) % ALIGNED == 0
        return (True, "vec") if aligned else (False, "none")

    cpu_fused_moe.CPUFusedMOE.check_grouped_gemm = choose
