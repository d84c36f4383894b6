"""The sequence mixers that a config may name, one for each layer."""

from models.language.attention import FixedAttention, SlidingAttention, SoftmaxAttention, StridedAttention
from models.language.delta_rule import GatedDeltaRule
from models.language.efficient_attention import EfficientAttention
from models.language.gated_attention_unit import GatedAttentionUnit
from models.language.kernel_attention import EluAttention, PerformerAttention
from models.language.linear_attention import LinearAttention
from models.language.recurrent import RecurrentMixer

# A new kind is a class with the same constructor, `forward` and `empty_cache`, and its name in config.MIXER_KINDS.
MIXERS: dict[str, type[SoftmaxAttention] | type[RecurrentMixer]] = {
    "full_attention": SoftmaxAttention,
    "sliding_attention": SlidingAttention,
    "strided_attention": StridedAttention,
    "fixed_attention": FixedAttention,
    "linear_attention": LinearAttention,
    "gated_delta_rule": GatedDeltaRule,
    "elu_attention": EluAttention,
    "efficient_attention": EfficientAttention,
    "performer_attention": PerformerAttention,
    "gated_attention_unit": GatedAttentionUnit,
}
