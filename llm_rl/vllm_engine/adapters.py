"""Adapters that vLLM serves beside the weights: it takes them from folders, and gives each its own number.

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


class AdapterShelf:
    """The one adapter that is served at present. Its folder lives in memory where the system offers that."""

    def __init__(self, rank: int) -> None:
        """rank: the largest that will come."""
        self.rank, self.number = rank, 0
        self.request: Any = None  # None: the base weights
        memory = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="adapter-")

    def engine_settings(self) -> dict[str, Any]:
        limit = next((rank for rank in RANKS if rank >= self.rank), RANKS[-1])
        return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": limit}

    def put(self, adapter: Adapter) -> Any:
        """The request that serves this adapter from now on. A new number each time: vLLM reads a folder once."""
        from vllm.lora.request import LoRARequest

        folder = Path(self._folder.name)
        write_adapter(folder, adapter.settings, dict(weights.tensors(adapter.tensors)))
        self.number += 1
        self.request = LoRARequest(f"policy-{self.number}", self.number, str(folder))
        return self.request

    def close(self) -> None:
        self._folder.cleanup()
