"""The `vllm.general_plugins` entry point: vLLM calls it in each of its processes, before it reads a model."""

from models.language.families import FAMILIES

SERVED_HERE = ("longstride", "dots1")  # vLLM gave up its own dots1 after 0.23


def register() -> None:
    """Make "longstride" folders known to transformers' AutoConfig, and what our model serves to vLLM. Calling it again
    does nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.platforms import current_platform

    from llm_rl.vllm_engine.config import LongstrideConfig
    from llm_rl.vllm_engine.experts import serve_float32_beside_amx

    AutoConfig.register(LongstrideConfig.model_type, LongstrideConfig, exist_ok=True)
    if current_platform.is_cpu():
        serve_float32_beside_amx()
    known = ModelRegistry.get_supported_archs()
    for model_type in SERVED_HERE:
        if FAMILIES[model_type].architecture not in known:
            # By name, so that the model's own imports wait until such a folder is loaded.
            ModelRegistry.register_model(
                FAMILIES[model_type].architecture, "llm_rl.vllm_engine.model:LongstrideForCausalLM"
            )
