"""A user's own Qwen3 folder and JSONL file through `train reason` on Ray and vLLM, and back into transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from llm_rl.tokenizer import train_tokenizer

SERVE = """
import json, sys
from llm_rl.generator import SamplingConfig
from llm_rl.vllm_engine.generator import VLLMGenerator
generator = VLLMGenerator(sys.argv[1], max_model_len=64, kv_cache_gib=0.1)
prompts = [[5, 6, 7, 8], [9, 10]]
groups = generator.generate(prompts, SamplingConfig(max_tokens=12), 2, seed=0)
print(json.dumps([[p, c.tokens, c.logprobs] for p, group in zip(prompts, groups) for c in group]))
"""


@pytest.mark.vllm
@pytest.mark.ray
def test_own_folder_and_file_train_and_load_elsewhere_with_equal_logprobs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What is {a} + {b}?", "answer": str(a + b), "solution": str(a + b)}
        for a in range(8)
        for b in range(8)
    ]
    problems = tmp_path / "own.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    tokenizer = train_tokenizer([row["prompt"] + row["answer"] for row in rows], 300)
    config = Qwen3Config(
        vocab_size=304, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "qwen3"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    flags = ["--model", str(folder), "--problems", str(problems), "--rl.iterations", "2", "--rl.max-tokens", "12"]
    flags += ["--rl.problems-per-iteration", "8", "--rl.samples", "4", "--eval.count", "6", "--rollout.workers", "1"]
    flags += ["--runs-dir", str(tmp_path), "--name", "own", "--learner.threads", "1", "--sft.steps", "4"]
    train = [sys.executable, "-m", "launch", "train", "reason", *flags]
    done = subprocess.run(train, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert summary["metrics"]["train/mismatch_max"] < 1e-5

    final = tmp_path / "own" / "policy" / "final"
    assert json.loads((final / "config.json").read_text())["model_type"] == "qwen3"
    command = [sys.executable, "-c", SERVE, str(final)]
    served = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert served.returncode == 0, served.stderr
    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    before = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, tokens, logprobs in json.loads(served.stdout.splitlines()[-1]):
        expected = score(theirs, prompt, tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)
        assert (score(before, prompt, tokens) - expected).abs().max() > 1e-3  # training has moved the policy


@torch.no_grad()
def score(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
