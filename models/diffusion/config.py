"""What the config.json files of a Stable Diffusion v1 folder say, as dataclasses.

The defaults are those of diffusers and transformers, which a config.json need not repeat. Settings that other
architectures use (and this one would silently ignore) are refused unless they have the value SD v1 has.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from models.errors import UserError


@dataclass(frozen=True)
class ComponentConfig:
    """Base of the three: reading and writing JSON."""

    FIXED: ClassVar[dict[str, Any]] = {}  # keys of other architectures, with the only value that is supported
    IGNORED: ClassVar[frozenset[str]] = frozenset()  # keys that change nothing in the forward pass

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Self:
        """Raises UserError naming the first key that describes another architecture."""
        known = {field.name for field in fields(cls)}
        given = {}
        for key, value in content.items():
            if key in known:
                given[key] = tuple(value) if isinstance(value, list) else value
            elif key in cls.FIXED:
                if _as_tuple(value) != _as_tuple(cls.FIXED[key]):
                    raise UserError(f"{source}: {key} is {value!r}; only {cls.FIXED[key]!r} is supported")
            elif not key.startswith("_") and key not in cls.IGNORED and value not in (None, False):
                raise UserError(f"{source}: {key} is {value!r}, which is not supported; is this a Stable Diffusion v1?")
        config = cls(**given)
        config.check(source)
        return config

    def check(self, source: str) -> None:
        """Raises UserError for values that no network can be built from."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {key: value for key, value in self.FIXED.items() if value is not None}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class UNetConfig(ComponentConfig):
    """UNet2DConditionModel. Its `attention_head_dim` is the number of heads: a misnomer that all the files carry."""

    sample_size: int | None = None  # latent height and width that the model was trained at
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int = 8
    norm_num_groups: int = 32

    FIXED: ClassVar[dict[str, Any]] = {
        "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "norm_eps": 1e-5,
        "downsample_padding": 1, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "dropout": 0.0, "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default",
        "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "conv_in_kernel": 3,
        "conv_out_kernel": 3, "attention_type": "default",
    }  # fmt: skip
    IGNORED = frozenset({"addition_embed_type_num_heads"})

    @classmethod
    def sd_v1(cls) -> "UNetConfig":
        """860 million parameters; latents of 64 × 64, text of width 768."""
        return cls(sample_size=64, cross_attention_dim=768)

    def check(self, source: str) -> None:
        levels = len(self.block_out_channels)
        for name, known in (
            ("down_block_types", {"CrossAttnDownBlock2D", "DownBlock2D"}),
            ("up_block_types", {"CrossAttnUpBlock2D", "UpBlock2D"}),
        ):
            types = getattr(self, name)
            if len(types) != levels:
                raise UserError(f"{source}: {name} lists {len(types)} blocks, block_out_channels {levels}")
            if not set(types) <= known:
                raise UserError(f"{source}: {name} holds {min(set(types) - known)}; use {' and '.join(sorted(known))}")
        for name in ("layers_per_block", "attention_head_dim", "cross_attention_dim"):
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{source}: {name} is {getattr(self, name)!r}; one number is supported")
        _check_groups(self.block_out_channels, self.norm_num_groups, source)
        for channels in self.block_out_channels:
            if channels % self.attention_head_dim:
                raise UserError(f"{source}: {channels} channels are not divisible by {self.attention_head_dim} heads")


@dataclass(frozen=True)
class AutoencoderConfig(ComponentConfig):
    """AutoencoderKL: each level but the last halves height and width, so four levels are `f8`."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
        "shift_factor": None, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    IGNORED = frozenset({"force_upcast"})

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> Self:
        content = dict(content)
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for block in set(content.pop(name, ())) - {only}:
                raise UserError(f"{source}: {name} holds {block}; only {only} is supported")
        return super().from_json(content, source)

    @classmethod
    def sd_v1(cls) -> "AutoencoderConfig":
        """84 million parameters; 512 × 512 images."""
        return cls(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)

    @property
    def factor(self) -> int:
        """Image pixels to one latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self, source: str) -> None:
        _check_groups(self.block_out_channels, self.norm_num_groups, source)

    def to_json(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        return super().to_json() | blocks


@dataclass(frozen=True)
class TextEncoderConfig(ComponentConfig):
    """CLIPTextModel."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    # Dropout, initialisation, the pooled output and its projection play no part in the condition.
    IGNORED = frozenset(
        {
            "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "attention_dropout",
            "dropout", "initializer_factor", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
            "projection_dim",
        }
    )  # fmt: skip

    @classmethod
    def sd_v1(cls) -> "TextEncoderConfig":
        """The text half of CLIP ViT-L/14; 123 million parameters."""
        return cls(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

    def check(self, source: str) -> None:
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise UserError(f"{source}: hidden_act is {self.hidden_act!r}; use quick_gelu or gelu")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"{source}: hidden_size {self.hidden_size} is not divisible by num_attention_heads")


def _check_groups(channels: tuple[int, ...], groups: int, source: str) -> None:
    for count in channels:
        if count % groups:
            raise UserError(f"{source}: {count} channels are not divisible by norm_num_groups {groups}")
