"""config.json of the "longstride" model type, for transformers and vLLM."""

from typing import Any

from transformers import PretrainedConfig

from models.language.config import LanguageConfig
from models.language.mixers import MIXERS
from models.language.recurrent import RecurrentMixer


class LongstrideConfig(PretrainedConfig):
    """Carries the fields that `LanguageConfig.to_hf` writes; `language` gives them back checked.

    transformers refuses layer types that it does not know, and vLLM counts layers by them. Both see what a layer keeps
    of the past (keys and values, a window of them, or a state); our own names are in `mixer_kinds`.
    """

    model_type = "longstride"

    def __init__(self, **fields: Any) -> None:
        defaults = LanguageConfig().to_hf() | {"qk_norm": True, "shared_expert_intermediate_size": 0, "num_experts": 0}
        for unwanted in ("architectures", "model_type"):
            defaults.pop(unwanted)
        fields = defaults | fields
        fields.setdefault("mixer_kinds", fields["layer_types"])
        fields["layer_types"] = [_standard_kind(kind) for kind in fields["mixer_kinds"]]
        super().__init__(**fields)

    @property
    def language(self) -> LanguageConfig:
        fields = self.to_dict()
        return LanguageConfig.from_hf(fields | {"layer_types": fields["mixer_kinds"]})


def language_config(hf_config: PretrainedConfig) -> LanguageConfig:
    """Our configuration, from what transformers made of a folder's config.json: ours, or a family's that we serve."""
    if isinstance(hf_config, LongstrideConfig):
        return hf_config.language
    return LanguageConfig.from_hf(hf_config.to_dict())


def _standard_kind(kind: str) -> str:
    if kind in MIXERS and issubclass(MIXERS[kind], RecurrentMixer):
        return "linear_attention"
    return "sliding_attention" if kind == "sliding_attention" else "full_attention"
