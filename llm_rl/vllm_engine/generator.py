"""Generator over a vLLM engine in this process."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from llm_rl import weights
from llm_rl.generator import Adapter, Completion, SamplingConfig, context_length, require_context
from llm_rl.vllm_engine.adapters import ServedAdapter
from llm_rl.vllm_engine.plugin import SERVED_HERE, register
from models.errors import UserError
from models.language.checkpoint import read_config

# Our model is written for eager torch: it is not compiled, but a step that only decodes is replayed as one CUDA graph.
_OWN_MODEL_GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


class VLLMGenerator:
    """vLLM sets up torch.distributed, patches torch and reads the environment: give the engine a process of its own.

    Weights arrive through vLLM's own reloading, which puts them into its kernels' layouts.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        kv_cache_gib: float = 0.5,
        enforce_eager: bool = True,
        adapter_rank: int = 0,
        seed: int = 0,
        record_experts: bool = False,
        version: int = 0,
    ) -> None:
        """
        max_model_len: longest prompt plus completion; the model's own limit if None.
        max_num_seqs: sequences decoded at once. max_num_batched_tokens: tokens of one engine step; longer prompts
        are read in several steps. kv_cache_gib: memory for keys, values and states. enforce_eager: on a GPU, do not
        compile or capture CUDA graphs (starts sooner, decodes slower); the CPU is always eager. record_experts:
        completions carry what the routers chose, which vLLM cannot tell on the CPU. adapter_rank: largest rank of the
        adapters that `load_adapter` will bring; 0 for none.

        Raises UserError if vLLM is missing, cannot use the device or refuses the settings, or the folder cannot be
        read.
        """
        config = read_config(model_folder)
        self.max_model_len = context_length(config, max_model_len)
        self._adapter = ServedAdapter(adapter_rank) if adapter_rank else None
        _set_environment(device)
        vllm = _import_vllm(device)
        self.version, self._device = version, device
        self._tied = config.tie_word_embeddings
        self._sampling_params = vllm.SamplingParams
        self._expert_dtype = np.uint8 if config.num_experts <= 256 else np.int16
        self._mixtures = [i for i in range(config.num_hidden_layers) if config.is_moe(i)] if record_experts else []
        try:
            self._engine = vllm.LLM(
                model=str(model_folder),
                dtype=dtype,
                skip_tokenizer_init=True,
                max_model_len=self.max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                **({"gpu_memory_utilization": _memory_share(kv_cache_gib)} if device == "cuda" else {}),
                enable_prefix_caching=False,  # a cached prefix rounds differently: no call would repeat itself
                enforce_eager=enforce_eager or device == "cpu",
                compilation_config=_OWN_MODEL_GRAPHS if config.model_type in SERVED_HERE else {},
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # no sampling defaults from the folder
                enable_return_routed_experts=record_experts,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=seed,
                **(self._adapter.engine_settings() if self._adapter else {}),
            )
        except ValueError as error:  # vLLM's word for settings that cannot work
            reason = " ".join(str(error).split())
            mend = "; raise kv_cache_gib or lower max_model_len" if "KV cache" in reason else ""
            mend += "; lower kv_cache_gib or end what else is on the GPU" if "Free memory" in reason else ""
            mend += "; choose --engine torch to record experts" if "routed-experts" in reason else ""
            raise UserError(f"vLLM refuses these settings: {reason}{mend}") from None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, samples: int, seed: int
    ) -> list[list[Completion]]:
        require_context(prompts, sampling, self.max_model_len)
        # Seeded once for the call: a generator for each request would make vLLM sample row by row.
        torch.manual_seed(seed)
        parameters = self._sampling_params(
            n=samples,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # only our own stop tokens stop
            logprobs=0,
            detokenize=False,
        )
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        request = self._adapter.request if self._adapter else None
        outputs = self._engine.generate(requests, parameters, use_tqdm=False, lora_request=request)
        return [
            [self._completion(sample, len(prompt)) for sample in output.outputs]
            for output, prompt in zip(outputs, prompts, strict=True)
        ]

    def _completion(self, sample: Any, prompt_length: int) -> Completion:
        tokens = list(sample.token_ids)
        logprobs = [candidates[token].logprob for token, candidates in zip(tokens, sample.logprobs, strict=True)]
        return Completion(tokens, logprobs, sample.finish_reason, self.version, self._experts(sample, prompt_length))

    def _experts(self, sample: Any, prompt_length: int) -> np.ndarray | None:
        """[P + C - 1, L, K] of the mixture layers; vLLM reports all layers."""
        if not self._mixtures:
            return None
        experts, read = sample.routed_experts[:, self._mixtures], prompt_length + len(sample.token_ids) - 1
        if len(experts) != read:
            raise RuntimeError(f"vLLM reported the experts of {len(experts)} tokens where it read {read}")
        return experts.astype(self._expert_dtype)

    def load_weights(self, named: Mapping[str, Any], version: int) -> None:
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._with_head(named)})
        weights.received(self._device)
        self.version = version

    def load_adapter(self, adapter: Adapter, version: int) -> None:
        if self._adapter is None:
            raise ValueError("the engine was started without an adapter_rank")
        self._adapter.replace(adapter, self._engine.llm_engine)
        self.version = version

    def _with_head(self, named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """vLLM's Qwen3-MoE holds a tied head as a module of its own, and reloading would leave the old one there."""
        for name, tensor in weights.tensors(named):
            yield name, tensor
            if self._tied and name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor

    def close(self) -> None:
        self._engine.llm_engine.engine_core.shutdown()
        del self._engine


def _set_environment(device: str) -> None:
    """Must happen before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights and seeds are handed over in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device == "cpu":
        torch._dynamo.config.disable = True  # some helpers compile even in eager mode, for seconds
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several engines must not pin the same cores


def _memory_share(kv_cache_gib: float) -> float:
    """Of the GPU. vLLM wants this much to be free before it starts: 92% unless told, also where the cache's size is
    given, so that an engine could not start beside another one, a learner or a model that draws."""
    return min(1.0, kv_cache_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def _import_vllm(device: str) -> Any:
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        extra = "cpu" if device == "cpu" else "gpu"
        raise UserError(
            f"vLLM cannot be imported ({error}); install longstride[{extra}], or choose --engine torch"
        ) from None
    if current_platform.device_type != device:
        raise UserError(
            f"this vLLM runs on {current_platform.device_type or 'no device found here'}, not on {device}; "
            f"choose --device {current_platform.device_type or 'cpu'} or --engine torch"
        )
    register()  # vLLM calls the entry point itself; this serves a checkout that is not installed
    return vllm
