"""Adapters that vLLM serves beside the weights. It takes them from folders, and knows each by a number.

vLLM refuses DoRA everywhere, and on the CPU (0.27) adapters in any model that has experts; our own model class takes
none. For those the learner sends whole weights, adapters merged.
"""

import tempfile
from pathlib import Path
from typing import Any

from llm_rl import weights
from llm_rl.generator import Adapter
from models.language.peft_folder import write_adapter

ADAPTER_FAMILIES = ("qwen3", "llama")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for the largest rank


class ServedAdapter:
    """The one adapter that an engine serves at present."""

    def __init__(self, rank: int) -> None:
        """rank: the largest that will come."""
        self.rank, self.number = rank, 0
        self.request: Any = None  # goes with each prompt; None: the base weights

    def engine_settings(self) -> dict[str, Any]:
        limit = next((rank for rank in RANKS if rank >= self.rank), RANKS[-1])
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": limit}

    def replace(self, adapter: Adapter, engine: Any) -> None:
        """Serve this one from now on. It gets a new number: vLLM reads no number twice."""
        from vllm.lora.request import LoRARequest

        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=memory if memory.is_dir() else None) as folder:
            write_adapter(Path(folder), adapter.settings, dict(weights.tensors(adapter.tensors)))
            self.number += 1
            self.request = LoRARequest(f"policy-{self.number}", self.number, folder)
            engine.add_lora(self.request)  # reads the folder, which is not needed afterwards
