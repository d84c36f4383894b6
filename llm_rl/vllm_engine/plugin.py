"""The `vllm.general_plugins` entry point: vLLM calls it in each of its processes, before it reads a model."""


def register() -> None:
    """Make "longstride" folders known to transformers' AutoConfig and to vLLM. Calling it again does nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from llm_rl.vllm_engine.config import LongstrideConfig

    AutoConfig.register(LongstrideConfig.model_type, LongstrideConfig, exist_ok=True)
    if "LongstrideForCausalLM" not in ModelRegistry.get_supported_archs():
        # By name, so that the model's own imports wait until a longstride folder is loaded.
        ModelRegistry.register_model("LongstrideForCausalLM", "llm_rl.vllm_engine.model:LongstrideForCausalLM")
