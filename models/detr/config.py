"""The shape of a DETR, under the names that transformers' config.json has for it."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from models.errors import UserError

LayerType = Literal["basic", "bottleneck"]

TIMM_RESNETS: dict[str, tuple[LayerType, tuple[int, ...], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
    "resnet101": ("bottleneck", (3, 4, 23, 3), (256, 512, 1024, 2048)),
}


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet v1.5 (stride in the 3×3 convolution). The default is ResNet-50."""

    layer_type: LayerType = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage. Stage i works at stride 4·2^i."""
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels that each stage puts out."""
    embedding_size: int = 64
    """Channels of the stem."""
    dilation: bool = False
    """The last stage dilates instead of striding: features twice as fine (DETR-DC5)."""

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.hidden_sizes) or not self.depths or min(self.depths) < 1:
            raise UserError(
                f"backbone: depths {list(self.depths)} and hidden_sizes {list(self.hidden_sizes)}: give one positive "
                "depth and one width a stage"
            )


@dataclass(frozen=True)
class DetrConfig:
    """The default is DETR-R50 as published, for COCO's 91 category numbers."""

    num_labels: int = 91
    """Classes without "no object", which is the last logit."""
    labels: tuple[str, ...] = ()
    """Their names, if known."""
    num_queries: int = 100
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    mask_head: bool = False
    """Predict a mask for each query too (panoptic segmentation)."""
    backbone: ResNetConfig = field(default_factory=ResNetConfig)

    def __post_init__(self) -> None:
        if self.labels and len(self.labels) != self.num_labels:
            raise UserError(f"DETR: {len(self.labels)} label names for {self.num_labels} labels")
        if (
            self.d_model % 4
            or self.d_model % self.encoder_attention_heads
            or self.d_model % self.decoder_attention_heads
        ):
            raise UserError(f"DETR: d_model {self.d_model} must be divisible by 4 and by the numbers of heads")
        if self.mask_head and len(self.backbone.depths) < 3:
            raise UserError("DETR: the mask head needs a backbone of at least 3 stages")
        if self.mask_head and not self._mask_head_has_whole_groups():
            raise UserError(f"DETR: d_model {self.d_model} gives the mask head no whole groups; use a power of two")

    def _mask_head_has_whole_groups(self) -> bool:
        widths = [self.d_model + self.encoder_attention_heads, *(self.d_model // n for n in (2, 4, 8, 16))]
        return all(width and width % min(8, width) == 0 for width in widths)


SHARED = [f.name for f in fields(DetrConfig) if f.name not in ("num_labels", "labels", "mask_head", "backbone")]


def from_hf(content: dict[str, Any], source: str) -> DetrConfig:
    """Read transformers' config.json. Raises UserError for a model that is not a DETR with a ResNet."""
    if content.get("model_type") != "detr":
        raise UserError(f"{source}: model_type is {content.get('model_type')!r}, not 'detr'")
    for key, wanted in (("position_embedding_type", "sine"), ("activation_function", "relu"), ("num_channels", 3)):
        if content.get(key, wanted) != wanted:
            raise UserError(f"{source}: {key} is {content[key]!r}; only {wanted!r} is supported")
    names = content.get("id2label") or {}
    count = len(names) or content.get("num_labels", 2)  # transformers' default
    if sorted(map(int, names)) != list(range(len(names))):
        raise UserError(f"{source}: id2label must name the classes 0 to {len(names) - 1} without gaps")
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    if labels == tuple(f"LABEL_{i}" for i in range(count)):  # transformers' way of saying that they have none
        labels = ()
    architectures = content.get("architectures") or []
    return DetrConfig(
        num_labels=count,
        labels=labels,
        mask_head="DetrForSegmentation" in architectures,
        backbone=_backbone(content, source),
        **{name: content[name] for name in SHARED if name in content},
    )


def _backbone(content: dict[str, Any], source: str) -> ResNetConfig:
    own = content.get("backbone_config")
    dilation = bool(content.get("dilation", False))
    if own is None or own.get("model_type") == "timm_backbone":
        name = (own or {}).get("backbone") or content.get("backbone") or "resnet50"
        if name not in TIMM_RESNETS:
            raise UserError(f"{source}: backbone {name!r}: only {', '.join(TIMM_RESNETS)} are supported")
        return ResNetConfig(*TIMM_RESNETS[name], dilation=dilation)
    if own.get("model_type") != "resnet":
        raise UserError(f"{source}: a backbone of type {own.get('model_type')!r}; only ResNets are supported")
    for key, wanted in (
        ("downsample_in_first_stage", False),
        ("downsample_in_bottleneck", False),
        ("hidden_act", "relu"),
    ):
        if own.get(key, wanted) != wanted:
            raise UserError(f"{source}: backbone_config.{key} is {own[key]!r}; only {wanted!r} is supported")
    plain = ResNetConfig()
    return ResNetConfig(
        layer_type=own.get("layer_type", plain.layer_type),
        depths=tuple(own.get("depths", plain.depths)),
        hidden_sizes=tuple(own.get("hidden_sizes", plain.hidden_sizes)),
        embedding_size=own.get("embedding_size", plain.embedding_size),
    )


def to_hf(config: DetrConfig) -> dict[str, Any]:
    """What config.json has to say so that transformers builds this model: with its own ResNet (no timm needed), or with
    timm's if the backbone is dilated, which transformers has only so.

    Raises UserError for a dilated backbone that is none of timm's.
    """
    names = config.labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
    return {
        "model_type": "detr",
        "architectures": ["DetrForSegmentation" if config.mask_head else "DetrForObjectDetection"],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "use_pretrained_backbone": False,
        **(_timm_backbone(config.backbone) if config.backbone.dilation else _own_backbone(config)),
        **{name: getattr(config, name) for name in SHARED},
    }


def _timm_backbone(backbone: ResNetConfig) -> dict[str, Any]:
    for name, shape in TIMM_RESNETS.items():
        if replace(backbone, dilation=False) == ResNetConfig(*shape):
            return {"use_timm_backbone": True, "backbone": name, "backbone_config": None, "dilation": True}
    raise UserError(
        "a dilated (DC5) backbone is saved under a name of timm's, and this one has none; only "
        f"{', '.join(TIMM_RESNETS)} have"
    )


def _own_backbone(config: DetrConfig) -> dict[str, Any]:
    stages = [f"stage{i + 1}" for i in range(len(config.backbone.depths))]
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config.backbone).items() if k != "dilation"}
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "out_features": stages if config.mask_head else stages[-1:],
            **shape,
        },
    }
