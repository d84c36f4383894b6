"""config.json of the "longstride" model type, for transformers and vLLM."""

from typing import Any

from transformers import PretrainedConfig

from models.language.config import LanguageConfig


class LongstrideConfig(PretrainedConfig):
    """Carries the fields that `LanguageConfig.to_hf` writes; `language` gives them back checked."""

    model_type = "longstride"

    def __init__(self, **fields: Any) -> None:
        defaults = LanguageConfig().to_hf() | {"qk_norm": True, "shared_expert_intermediate_size": 0, "num_experts": 0}
        for unwanted in ("architectures", "model_type"):
            defaults.pop(unwanted)
        super().__init__(**defaults | fields)

    @property
    def language(self) -> LanguageConfig:
        return LanguageConfig.from_hf(self.to_dict())
