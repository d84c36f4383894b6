"""config.json of the "longstride" model type, for transformers and vLLM."""

from typing import Any

from transformers import PretrainedConfig

from models.language.config import LanguageConfig


class LongstrideConfig(PretrainedConfig):
    """Carries the fields that `LanguageConfig.to_hf` writes."""

    model_type = "longstride"

    def __init__(self, **fields: Any) -> None:
        defaults = LanguageConfig().to_hf() | {"qk_norm": True, "shared_expert_intermediate_size": 0, "num_experts": 0}
        for unwanted in ("architectures", "model_type"):
            defaults.pop(unwanted)
        super().__init__(**defaults | fields)


def language_config(hf_config: PretrainedConfig) -> LanguageConfig:
    """Our configuration, from what transformers made of a folder's config.json: ours, or a family's that we serve."""
    return LanguageConfig.from_hf(hf_config.to_dict())
