"""Memory and speed of training a 1.5B policy in full and with adapters, beside peft on transformers' model.

python -m benchmarks.lora_memory                         on a GPU: about two minutes
python -m benchmarks.lora_memory --device cpu --toy      the same code at toy size

All start from the same random bfloat16 weights, read the same batch, and end in the same loss (token_logprobs), so the
first losses agree. Attention is FlashAttention on both sides; nothing is recomputed in the backward pass. Ours step
with MasterAdamW, which keeps float32 masters; peft keeps its adapters in float32 by itself, or in bfloat16 when told to
(`autocast_adapter_dtype=False`), and torch's AdamW steps them. The figures are of steps after the first two.
"""

import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.record import end_in_order, write_result
from llm_rl.logprobs import token_logprobs
from llm_rl.optimizer import MasterAdamW
from models.language.checkpoint import to_checkpoint
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.lora import LoraConfig, attach
from models.language.packing import Packing

QWEN_1_5B = LanguageConfig(  # Qwen2.5-1.5B with Qwen3's head norms
    vocab_size=151_936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    head_dim=128, intermediate_size=8960, max_position_embeddings=32_768,
)  # fmt: skip
TOY = dataclasses.replace(
    QWEN_1_5B, vocab_size=512, hidden_size=96, num_hidden_layers=2, intermediate_size=256, head_dim=8
)
WARM_UP = 2
Step = Callable[[], float]  # one optimizer step; returns the loss


@dataclasses.dataclass
class Config:
    device: str = "cuda"
    toy: bool = False
    sequences: int = 4
    length: int = 2048
    rank: int = 16
    steps: int = 6  # measured, after the warm-up
    output: Path = Path("benchmarks/results/lora_memory.json")


def main(config: Config) -> None:
    if config.toy:
        config = dataclasses.replace(config, sequences=2, length=64)
    shape = TOY if config.toy else QWEN_1_5B
    end_in_order()
    ours: dict[str, Any] = {}
    peer: dict[str, Any] = {}
    try:
        for name in ("full", "lora", "dora"):
            ours[name] = measured(config, functools.partial(our_step, config, shape, name))
            print("ours", name, ours[name], flush=True)
        for kind, adapters in itertools.product(("lora", "dora"), ("float32", "bfloat16")):
            prepare = functools.partial(peft_step, config, shape, kind, adapters == "float32")
            peer[f"{kind}, {adapters}"] = measured(config, prepare)
            print("peft", kind, adapters, peer[f"{kind}, {adapters}"], flush=True)
    except ImportError as error:
        print(f"no peer: {error}", flush=True)
    finally:
        settings = {"batch": [config.sequences, config.length], "rank": config.rank, "targets": "all linear layers"}
        write_result(config.output, "lora_memory", settings | ours, peer, ratios(ours, peer), machine(config.device))


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Ours over the peer's: speed (more is better) and peak memory (less is better)."""
    found = {}
    for name, theirs in peer.items():
        mine = ours[name.partition(",")[0]]
        for figure in ("tokens_per_s", "peak_gib"):
            if mine.get(figure) and theirs.get(figure):
                found[f"{figure}, {name}"] = round(mine[figure] / theirs[figure], 3)
    return found


def machine(device: str) -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if device == "cuda" else ""


def measured(config: Config, prepare: Callable[[], tuple[Step, int]]) -> dict[str, Any]:
    """The figures of one way to train, after what the one before it held is given back."""
    gc.collect()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    try:
        return figures_of(config, prepare)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def figures_of(config: Config, prepare: Callable[[], tuple[Step, int]]) -> dict[str, Any]:
    """Tokens per second, peak and resting memory in GiB (of a GPU), trained parameters, first and last loss."""
    gpu = config.device == "cuda"
    step, trained = prepare()
    losses, times = [], []
    for number in range(WARM_UP + config.steps):
        if gpu and number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(step())  # reads the loss, so the device has finished
        times.append(time.perf_counter() - begin)
    return {
        "tokens_per_s": round(config.sequences * config.length / median(times[WARM_UP:])),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else 0.0,
        "resting_gib": round(torch.cuda.memory_allocated() / 2**30, 2) if gpu else 0.0,
        "trained_parameters": trained,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def our_step(config: Config, shape: LanguageConfig, kind: str) -> tuple[Step, int]:
    model = random_model(config, shape)
    if kind != "full":
        attach(model, LoraConfig(config.rank, 2 * config.rank, ("all-linear",), use_dora=kind == "dora"), seed=0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = MasterAdamW(named, (0.9, 0.95), 0.0)
    tokens_T, targets_T = batch(config, shape)
    packing = Packing.of([config.length] * config.sequences, config.device)

    def step() -> float:
        loss = -token_logprobs(model(tokens_T, packing), model.head_weight, targets_T).mean()
        loss.backward()
        optimizer.gather()
        optimizer.step(1e-4)
        return loss.item()

    return step, sum(p.numel() for p in named.values())


def peft_step(config: Config, shape: LanguageConfig, kind: str, float32: bool) -> tuple[Step, int]:
    import peft
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {name: value for name, value in shape.to_hf().items() if name not in ("architectures", "model_type")}
    with torch.device("meta"):
        base = Qwen3ForCausalLM(Qwen3Config(**fields, attn_implementation="sdpa"))
    state = dict(to_checkpoint(random_model(config, shape)))
    base.load_state_dict(state, strict=False, assign=True)
    base.tie_weights()
    with torch.device(config.device):  # its buffers are no parameters, and so were not replaced
        base.model.rotary_emb = type(base.model.rotary_emb)(base.config)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, settings, autocast_adapter_dtype=float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens_T, targets_T = batch(config, shape)
    tokens_BL = tokens_T.view(config.sequences, config.length)

    def step() -> float:
        hidden_BLD = base.model(tokens_BL, use_cache=False).last_hidden_state
        loss = -token_logprobs(hidden_BLD.flatten(0, 1), base.lm_head.weight, targets_T).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def random_model(config: Config, shape: LanguageConfig) -> Decoder:
    """The same weights each time, drawn where they stay: the decoder's own initialisation draws on the host."""
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(torch.bfloat16).to_empty(device=config.device)
    generator = torch.Generator(config.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def batch(config: Config, shape: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Random tokens, and random targets: neither memory nor speed depends on what they are."""
    generator = torch.Generator(config.device).manual_seed(1)
    shape_T = (config.sequences * config.length,)
    tokens_T = torch.randint(shape.vocab_size, shape_T, generator=generator, device=config.device)
    return tokens_T, tokens_T.roll(-1)


if __name__ == "__main__":
    main(tyro.cli(Config))
