"""Adapters that vLLM serves beside the weights, against the learner that trains them."""

from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_rl import weights
from llm_rl.generator import Adapter, SamplingConfig
from llm_rl.torch_generator import TorchGenerator
from llm_rl.vllm_engine.adapters import require_servable
from llm_rl.vllm_engine.generator import VLLMGenerator
from models.errors import UserError
from models.language.checkpoint import save_pretrained
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.lora import LoraConfig, attach, merge
from models.language.peft_folder import adapter_settings, adapter_tensors
from tests.llm_rl.scoring import differences
from tests.models.language.policies import DENSE, GLM, HYBRID, MOE, RECURRENT, SPARSE

ATTENTION = ("q_proj", "k_proj", "o_proj")
# name: (policy, targets of the adapter)
KINDS: dict[str, tuple[LanguageConfig, tuple[str, ...]]] = {
    "qwen3": (replace(DENSE, head_dim=32), (*ATTENTION, "down_proj", "gate_proj")),
    "qwen3_moe": (replace(MOE, head_dim=32), ATTENTION),
    "glm4_moe": (replace(GLM, head_dim=32), ATTENTION),
    "longstride, hybrid": (replace(HYBRID, head_dim=32), (*ATTENTION, "v_proj", "g_proj")),
    "longstride, recurrent": (replace(RECURRENT, head_dim=32, num_experts=0), ("all-linear",)),
    "longstride, sparse": (replace(SPARSE, head_dim=32), ATTENTION),
}
PROMPTS = [list(range(90)), [7], [7, 8], list(range(20, 69)), list(range(40, 88)), [5, 9, 11]]
SAMPLING = SamplingConfig(temperature=0.8, max_tokens=24, stop_token_ids=(3, 4))


def serve(kind: str, device: str, folder: str) -> dict[str, tuple[float, float]]:
    """Mean and largest difference to a learner whose adapter moves twice; the base weights stay in the engines."""
    config, targets = KINDS[kind]
    config = replace(config, initializer_range=0.08)  # larger weights come near 1e-5 by rounding
    dtype = "float32" if device == "cpu" else "bfloat16"
    model = Decoder(config).init_weights(seed=0)
    save_pretrained(model, folder)
    model = model.to(device, getattr(torch, dtype)).eval()
    attach(model, LoraConfig(r=4, alpha=8.0, targets=targets, init="pissa"), seed=1)
    settings = {"device": device, "dtype": dtype, "max_num_seqs": 16}
    limits = {"max_num_batched_tokens": 48, "kv_cache_gib": 0.1, "enforce_eager": not kind.startswith("longstride")}
    engines = {"vllm": VLLMGenerator(folder, adapter_rank=8, **settings, **limits)}
    if device == "cpu":
        engines["torch"] = TorchGenerator(folder, **settings)
    report = {}

    def compare(tag: str, learner: Decoder) -> None:
        for name, engine in engines.items():
            groups = engine.generate(PROMPTS, SAMPLING, 2, 1)
            off = differences(learner, PROMPTS, groups, SAMPLING.temperature).abs()
            report[f"{tag} {name}"] = off.mean().item(), off.max().item()

    compare("start", model)
    for step in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.mul_(1.3)
        compare(f"stale {step}", model)
        adapter = Adapter(adapter_settings(model), weights.export(adapter_tensors(model)))
        for engine in engines.values():
            engine.load_adapter(adapter, version=step)
            assert engine.version == step
        compare(f"fresh {step}", model)
    merged = deepcopy(model)
    merge(merged)
    compare("merged", merged)
    engines["vllm"].close()
    return report


@pytest.mark.vllm
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_served_beside_the_weights(kind: str, engines: ProcessPoolExecutor, tmp_path: Path) -> None:
    for name, (_, worst) in engines.submit(serve, kind, "cpu", str(tmp_path)).result(timeout=240).items():
        if name.startswith("stale"):
            assert worst > 1e-3, name
        else:
            assert worst <= (2e-5 if name.startswith("merged") else 1e-5), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "longstride, hybrid", "longstride, recurrent"])
def test_adapters_on_a_gpu(kind: str, engine_of_its_own: ProcessPoolExecutor, tmp_path: Path) -> None:
    """In bfloat16, our own models with CUDA graphs. Merged weights are rounded once more than what vLLM computes."""
    report = engine_of_its_own.submit(serve, kind, "cuda", str(tmp_path)).result(timeout=240)
    for name, (mean, worst) in report.items():
        print(f"{kind}, {name}: mean {mean:.4f}, largest {worst:.3f}")
    for tag in ("start", "fresh 1", "fresh 2", "merged"):
        assert report[f"{tag} vllm"][0] < 0.06, tag
    for step in (1, 2):
        assert report[f"stale {step} vllm"][0] > 2 * report[f"fresh {step} vllm"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "does not serve DoRA beside the weights; use"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, "adapters on experts.down_proj"),
        ({"target_modules": ["o_proj", "mlp.shared_expert_gate"]}, "adapters on mlp.shared_expert_gate beside"),
    ],
)
def test_adapters_that_are_not_served(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"{message}.*--rl.lora.serve merged"):
        require_servable(settings)
    require_servable({"use_dora": False, "target_modules": ["q_proj", "model.layers.0.self_attn.o_proj"]})


def test_a_rank_without_room_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    save_pretrained(Decoder(DENSE).init_weights(0), tmp_path)
    with pytest.raises(UserError, match=r"rank 512 at most, and this one has 640.*--rl.lora.rank"):
        VLLMGenerator(tmp_path, adapter_rank=640)
