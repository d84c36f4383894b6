"""The denoiser: a UNet conditioned on time and text (Rombach et al. 2022, arXiv 2112.10752; Stable Diffusion v1).

Shapes: B images, C channels, H × W latent pixels, D width of the time embedding, M text tokens of width E.
Parameter names are those of diffusers' UNet2DConditionModel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.attention import SpatialTransformer
from models.diffusion.config import UNetConfig
from models.diffusion.resnet import Downsample, ResnetBlock, Upsample

EPS = 1e-5


class UNet(nn.Module):
    """Predicts the noise (or the velocity) in a noisy latent: unet(x, time, unet.read(context))."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_dim = 4 * widths[0]
        self.read: nn.Module = nn.Identity()  # of the context, before the first step; see fused_unet.py
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding: nn.Module = TimeEmbedding(widths[0], time_dim)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the feature maps that the way up will meet, the latest last
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            attends = config.down_block_types[level].startswith("CrossAttn")
            inputs = [channels] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(DownBlock(config, inputs, width, attends, downsamples=not last))
            skips += [width] * (config.layers_per_block + (not last))
            channels = width

        self.mid_block = MidBlock(config, channels)

        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            last = level == len(widths) - 1
            attends = config.up_block_types[level].startswith("CrossAttn")
            inputs = []
            for _ in range(config.layers_per_block + 1):
                inputs.append(channels + skips.pop())
                channels = width
            self.up_blocks.append(UpBlock(config, inputs, width, attends, upsamples=not last))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, time: Tensor | float, context_BME: Tensor) -> Tensor:
        """time: one timestep, or one per image (B,), in units of the training schedule; fractions are allowed."""
        # A number is filled in on the GPU: as a tensor it would be copied there, and the host wait for the last step.
        if not isinstance(time, Tensor):
            time = torch.full((), time, device=x_BCHW.device)
        time_BD = self.time_embedding(time.to(x_BCHW.device).expand(len(x_BCHW)))
        x_BCHW = self.conv_in(x_BCHW)
        skips = [x_BCHW]
        for down in self.down_blocks:
            x_BCHW, made = down(x_BCHW, time_BD, context_BME)
            skips += made
        x_BCHW = self.mid_block(x_BCHW, time_BD, context_BME)
        for up in self.up_blocks:
            x_BCHW = up(x_BCHW, skips, time_BD, context_BME)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (Vaswani et al. 2017), cosines first, through a two-layer perceptron, and the SiLU with
    which every residual block begins."""

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sinusoids, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time_B: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time_B.device) / half)
        angles = time_B.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(sinusoids))))


class DownBlock(nn.Module):
    """Residual blocks, each with or without attention, then half the resolution."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attends: bool, downsamples: bool) -> None:
        super().__init__()
        self.resnets, self.attentions = _layers(config, inputs, width, attends)
        self.downsamplers = nn.ModuleList([Downsample(width)] if downsamples else [])

    def forward(self, x_BCHW: Tensor, time_BD: Tensor, context_BME: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and every feature map on the way to it, for the skip connections."""
        made = []
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(x_BCHW, time_BD)
            if self.attentions:
                x_BCHW = self.attentions[i](x_BCHW, context_BME)
            made.append(x_BCHW)
        for downsample in self.downsamplers:
            x_BCHW = downsample(x_BCHW)
            made.append(x_BCHW)
        return x_BCHW, made


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__()
        self.resnets, self.attentions = _layers(config, [width, width], width, attends=True)
        del self.attentions[1]

    def forward(self, x_BCHW: Tensor, time_BD: Tensor, context_BME: Tensor) -> Tensor:
        x_BCHW = self.attentions[0](self.resnets[0](x_BCHW, time_BD), context_BME)
        return self.resnets[1](x_BCHW, time_BD)


class UpBlock(nn.Module):
    """Residual blocks over the features and a skip connection each, then twice the resolution."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, attends: bool, upsamples: bool) -> None:
        super().__init__()
        self.resnets, self.attentions = _layers(config, inputs, width, attends)
        self.upsamplers = nn.ModuleList([Upsample(width)] if upsamples else [])

    def forward(self, x_BCHW: Tensor, skips: list[Tensor], time_BD: Tensor, context_BME: Tensor) -> Tensor:
        """Takes its skip connections off the end of `skips`."""
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(torch.cat([x_BCHW, skips.pop()], dim=1), time_BD)
            if self.attentions:
                x_BCHW = self.attentions[i](x_BCHW, context_BME)
        for upsample in self.upsamplers:
            # An odd height or width was rounded up on the way down; the next skip knows what it was.
            x_BCHW = upsample(x_BCHW, skips[-1].shape[-2:])
        return x_BCHW


def _layers(config: UNetConfig, inputs: list[int], width: int, attends: bool) -> tuple[nn.ModuleList, nn.ModuleList]:
    time_dim = 4 * config.block_out_channels[0]
    groups = config.norm_num_groups
    resnets = nn.ModuleList(ResnetBlock(channels, width, groups, EPS, time_dim) for channels in inputs)
    attentions = nn.ModuleList(
        SpatialTransformer(width, config.cross_attention_dim, config.attention_head_dim, groups)
        for _ in (inputs if attends else ())
    )
    return resnets, attentions
