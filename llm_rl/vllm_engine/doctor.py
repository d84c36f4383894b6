"""A short check that vLLM works here with our own layer kinds; `longstride doctor` runs it in a child process."""

import tempfile
import time
from pathlib import Path

import torch

from llm_rl.batch import Sample, pack
from llm_rl.generator import SamplingConfig
from llm_rl.logprobs import token_logprobs
from llm_rl.vllm_engine.generator import VLLMGenerator
from models.language.checkpoint import load_pretrained, save_pretrained
from models.language.config import LanguageConfig
from models.language.decoder import Decoder


def check() -> str:
    """Serve a small random policy (mixture of experts, linear beside softmax attention) and compare its
    log-probabilities with the learner's. Raises if they differ, returns a line for people if not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LanguageConfig(
        layer_types=("linear_attention", "full_attention"), num_hidden_layers=2, num_experts=4, initializer_range=0.08
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pretrained(Decoder(config).init_weights(0), folder)
        begin = time.perf_counter()
        generator = VLLMGenerator(folder, device=device, max_model_len=256, kv_cache_gib=0.1)
        started = time.perf_counter()
        prompts = [[1 + i, 2, 3] for i in range(32)]
        groups = generator.generate(prompts, SamplingConfig(max_tokens=48), 1, seed=0)
        seconds = time.perf_counter() - started
        model = load_pretrained(folder, device=device)
    batch = pack([Sample(p, g[0].tokens, g[0].logprobs) for p, g in zip(prompts, groups)], device)
    with torch.no_grad():
        hidden_TD = model(batch.tokens_T, batch.packing)
        logprobs_N = token_logprobs(hidden_TD[batch.predict_N], model.head_weight, batch.targets_N)
    difference = (logprobs_N - batch.sampler_N).abs().max().item()
    limit = 1e-5 if device == "cpu" else 1e-2  # TF32 and other kernels on a GPU
    if difference > limit:
        raise AssertionError(f"vLLM's log-probabilities are off by {difference:.1e} (limit {limit:.0e})")
    tokens = sum(len(group[0].tokens) for group in groups)
    return (
        f"hybrid MoE on {device}: started in {started - begin:.0f} s, {tokens / seconds:.0f} tokens/s, "
        f"log-probabilities within {difference:.0e} of the learner's"
    )
