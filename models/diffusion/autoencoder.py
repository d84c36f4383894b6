"""The autoencoder with a KL-regularised latent space (Rombach et al. 2022, section 3.1; Kingma and Welling 2014).

Shapes: B images, C channels, H × W pixels, h × w latent pixels, Z latent channels. Images lie in [-1, 1].
Parameter names are those of diffusers' AutoencoderKL.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.diffusion.attention import PixelAttention
from models.diffusion.config import AutoencoderConfig
from models.diffusion.noise_schedule import draw_noise
from models.diffusion.resnet import Downsample, ResnetBlock, Upsample

EPS = 1e-6


@dataclass(frozen=True)
class Posterior:
    """q(z | x): a normal distribution with independent components."""

    mean_BZhw: Tensor
    log_variance_BZhw: Tensor  # within [-30, 20]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """μ + σ ε, the reparametrisation trick."""
        noise_BZhw = draw_noise(self.mean_BZhw.shape, generator, self.mean_BZhw.device)
        return self.mean_BZhw + (0.5 * self.log_variance_BZhw).exp() * noise_BZhw.to(self.mean_BZhw.dtype)

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, 1)) of each image, (B,), summed over the latent (Kingma and Welling, appendix B)."""
        divergence = self.mean_BZhw.square() + self.log_variance_BZhw.exp() - 1 - self.log_variance_BZhw
        return 0.5 * divergence.sum(dim=(1, 2, 3))


class Autoencoder(nn.Module):
    """Image to latent and back. The denoiser works on `scaling_factor` times the latent."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, image_BCHW: Tensor) -> Posterior:
        mean_BZhw, log_variance_BZhw = self.quant_conv(self.encoder(image_BCHW)).chunk(2, dim=1)
        return Posterior(mean_BZhw, log_variance_BZhw.clamp(-30.0, 20.0))

    def decode(self, latent_BZhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent_BZhw))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            resnets = _resnets(channels, width, config.layers_per_block, groups)
            halving = nn.ModuleList([] if last else [Downsample(width, one_sided=True)])
            self.down_blocks.append(nn.ModuleDict({"resnets": resnets, "downsamplers": halving}))
            channels = width
        self.mid_block = MidBlock(channels, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels, EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns mean and log-variance before `quant_conv`, (B, 2Z, h, w)."""
        x_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            x_BCHW = _through(block, x_BCHW)
        x_BCHW = self.mid_block(x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = MidBlock(channels, groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            last = level == len(widths) - 1
            resnets = _resnets(channels, width, config.layers_per_block + 1, groups)
            doubling = nn.ModuleList([] if last else [Upsample(width)])
            self.up_blocks.append(nn.ModuleDict({"resnets": resnets, "upsamplers": doubling}))
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, latent_BZhw: Tensor) -> Tensor:
        x_BCHW = self.mid_block(self.conv_in(latent_BZhw))
        for block in self.up_blocks:
            x_BCHW = _through(block, x_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(x_BCHW)))


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x_BCHW)))


def _resnets(in_channels: int, out_channels: int, count: int, groups: int) -> nn.ModuleList:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList(ResnetBlock(channels, out_channels, groups, EPS, time_dim=None) for channels in inputs)


def _through(block: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The residual blocks of a level, then its change of resolution if it has one."""
    for layers in block.children():
        for layer in layers.children():
            x_BCHW = layer(x_BCHW)
    return x_BCHW
