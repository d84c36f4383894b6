"""Which kernel of vLLM experts on the CPU get."""

from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from llm_rl.vllm_engine.plugin import register


def kernel(dtype: torch.dtype, hidden: int, amx: bool) -> tuple[bool, str]:
    from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

    register()
    layer = SimpleNamespace(
        w13_weight=torch.empty(2, 64, hidden, dtype=dtype),
        w2_weight=torch.empty(2, hidden, 32, dtype=dtype),
        activation=None,
    )
    with mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=amx):
        return CPUFusedMOE.check_grouped_gemm(object.__new__(CPUFusedMOE), layer)


@pytest.mark.vllm
@pytest.mark.parametrize("hidden", [64, 48])
def test_amx_changes_nothing_for_experts_in_float32(hidden: int, engines: ProcessPoolExecutor) -> None:
    without, beside = (engines.submit(kernel, torch.float32, hidden, amx).result(timeout=240) for amx in (False, True))
    assert beside == without
    assert beside == ((True, "vec") if hidden == 64 else (False, "none"))


@pytest.mark.vllm
def test_experts_in_bfloat16_take_amx(engines: ProcessPoolExecutor) -> None:
    assert engines.submit(kernel, torch.bfloat16, 64, True).result(timeout=240) == (True, "amx")
