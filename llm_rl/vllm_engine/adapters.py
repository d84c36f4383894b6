"""Adapters that vLLM serves beside the weights. It takes them from folders, and knows each by a number.

Linears of every family and of our own layer kinds can have them. Experts cannot here: vLLM reads theirs in a format of
its own, and has no CPU kernels for it. DoRA it refuses. For those the learner sends whole weights, adapters merged.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_rl import weights
from llm_rl.generator import Adapter
from models.errors import UserError
from models.language.peft_folder import write_adapter

# vLLM's names of the linears that get room for an adapter: all but routers and gates of one output.
LINEARS = (
    "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "b_proj", "z_proj", "gate_up_proj", "gate_proj",
    "up_proj", "down_proj",
)  # fmt: skip
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for the largest rank


class ServedAdapter:
    """The one adapter that an engine serves at present."""

    def __init__(self, rank: int) -> None:
        """rank: the largest that will come. Raises UserError for one that vLLM has no room for."""
        if rank > RANKS[-1]:
            raise UserError(
                f"vLLM serves adapters of rank {RANKS[-1]} at most, and this one has {rank} (with init pissa twice its "
                "rank); lower --rl.lora.rank, or use --rl.lora.serve merged"
            )
        self.rank, self.number = rank, 0
        self.request: Any = None  # goes with each prompt; None: the base weights

    def engine_settings(self) -> dict[str, Any]:
        limit = next(rank for rank in RANKS if rank >= self.rank)
        return {
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": limit,
            "lora_target_modules": [*LINEARS],
        }

    def replace(self, adapter: Adapter, engine: Any) -> None:
        """Serve this one from now on. It gets a new number: vLLM reads no number twice.

        Raises UserError for an adapter that vLLM cannot put beside the weights.
        """
        from vllm.lora.request import LoRARequest

        require_servable(adapter.settings)

        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=memory if memory.is_dir() else None) as folder:
            write_adapter(Path(folder), adapter.settings, dict(weights.tensors(adapter.tensors)))
            self.number += 1
            self.request = LoRARequest(f"policy-{self.number}", self.number, folder)
            engine.add_lora(self.request)  # reads the folder, which is not needed afterwards


def require_servable(settings: Mapping[str, Any]) -> None:
    """settings: the content of adapter_config.json. Raises UserError for what vLLM does not put beside the weights."""
    reason = ""
    if settings.get("use_dora"):
        reason = "vLLM does not serve DoRA"
    others = [name for name in settings.get("target_modules") or () if name.rpartition(".")[2] not in LINEARS]
    if others := [*others, *(settings.get("target_parameters") or ())]:
        reason = f"vLLM does not serve adapters on {' and '.join(others)}"
    if reason:
        raise UserError(f"--rl.lora.serve adapter: {reason} beside the weights; use --rl.lora.serve merged")
