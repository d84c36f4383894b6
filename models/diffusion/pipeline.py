"""From text, or text and image, to an image: encode the prompt, denoise a latent, decode it.

Shapes: B images, C channels, H × W pixels, Z latent channels, h × w latent pixels, M tokens of width E.
Images handed in and out lie in [0, 1]. The latents of a pass are float32, whatever the networks are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion.autoencoder import Autoencoder
from models.diffusion.noise_schedule import SchedulerConfig, draw_noise
from models.diffusion.schedulers import Scheduler, make_scheduler
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.tokenizer import PromptTokenizer
from models.diffusion.unet import UNet
from models.errors import UserError

Denoiser = Callable[[Tensor, Tensor | float, Tensor], Tensor]  # a UNet: of latents, time and context


@dataclass
class LatentDiffusion:
    """The parts of a Stable Diffusion v1 folder."""

    autoencoder: Autoencoder
    unet: UNet
    text_encoder: TextEncoder
    tokenizer: PromptTokenizer
    scheduler: SchedulerConfig

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The condition (B, M, E)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, Z, h, w), a sample of the posterior, in the denoiser's scale.

        Raises UserError if height or width is not a multiple of the autoencoder's factor.
        """
        factor = self.autoencoder.config.factor
        for side in images_BCHW.shape[-2:]:
            if side % factor:
                raise UserError(f"an image has a side of {side} pixels: height and width must be multiples of {factor}")
        weight = self.autoencoder.quant_conv.weight
        posterior = self.autoencoder.encode((images_BCHW * 2 - 1).to(weight.device, weight.dtype))
        return posterior.sample(generator).float() * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents_BZhw: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1], float32."""
        latents_BZhw = latents_BZhw / self.autoencoder.config.scaling_factor
        images_BCHW = self.autoencoder.decode(latents_BZhw.to(self.autoencoder.quant_conv.weight.dtype))
        return (images_BCHW.float() / 2 + 0.5).clamp(0, 1)


def guided_prediction(
    unet: Denoiser, x_BZhw: Tensor, time: float | Tensor, context_BME: Tensor, empty_BME: Tensor, guidance: float
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): ε_∅ + w (ε_text − ε_∅), float32.

    time: one timestep, or one per image (B,). empty_BME: the condition to move away from. guidance: w; the text alone
    at w = 1, and then in one pass of the network instead of two.
    """
    x_BZhw = x_BZhw.to(context_BME.dtype)
    if guidance == 1:
        return unet(x_BZhw, time, context_BME).float()
    time = time.repeat(2) if isinstance(time, Tensor) else time
    both = unet(torch.cat([x_BZhw, x_BZhw]), time, torch.cat([empty_BME, context_BME])).float()
    without, with_text = both.chunk(2)
    return without + guidance * (with_text - without)


@torch.no_grad()
def denoise(
    unet: UNet,
    scheduler: Scheduler,
    x_BZhw: Tensor,
    context_BME: Tensor,
    empty_BME: Tensor,
    guidance: float,
    generator: torch.Generator | None = None,
    first_step: int = 0,
) -> Tensor:
    """Take the latents through the scheduler's steps, from `first_step` on."""
    context_BME, empty_BME = unet.read(context_BME), unet.read(empty_BME)
    for i in range(first_step, len(scheduler.timesteps)):
        prediction_BZhw = guided_prediction(
            unet, scheduler.model_input(x_BZhw, i), scheduler.timesteps[i], context_BME, empty_BME, guidance
        )
        x_BZhw = scheduler.step(prediction_BZhw, i, x_BZhw, generator)
    return x_BZhw


def text_to_image(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    steps: int = 50,
    guidance: float = 7.5,
    negative: str = "",
    size: tuple[int, int] | None = None,
    latents_BZhw: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw an image for each prompt: (B, C, H, W) in [0, 1].

    steps: of the scheduler that the model names. guidance: see `guided_prediction`. negative: the prompt to move away
    from. size: height and width in pixels, by default what the model was trained at. latents_BZhw: standard normal
    noise to begin with, by default drawn. generator: of that noise, and of the noise that some schedulers add.
    Raises UserError for a size or step count that the model cannot do.
    """
    scheduler = make_scheduler(model.scheduler, steps)
    if latents_BZhw is None:
        shape = (len(prompts), model.unet.config.in_channels, *_latent_size(model, size))
        latents_BZhw = draw_noise(shape, generator, model.device)
    context_BME, empty_BME = model.encode_prompts(prompts), model.encode_prompts([negative] * len(prompts))
    x_BZhw = latents_BZhw.to(model.device) * scheduler.initial_std
    x_BZhw = denoise(model.unet, scheduler, x_BZhw, context_BME, empty_BME, guidance, generator)
    return model.decode_latents(x_BZhw)


def image_to_image(
    model: LatentDiffusion,
    images_BCHW: Tensor,
    prompts: Sequence[str],
    *,
    strength: float = 0.8,
    steps: int = 50,
    guidance: float = 7.5,
    negative: str = "",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Redraw each image (in [0, 1]) to its prompt (SDEdit, Meng et al. 2022, arXiv 2108.01073): (B, C, H, W) in [0, 1].

    strength: the share of the steps that are made, on the image with as much noise as belongs to the first of them.
    Raises UserError if that share is no step, and for image sizes that the model cannot do.
    """
    if len(images_BCHW) != len(prompts):
        raise UserError(f"image to image: {len(images_BCHW)} images but {len(prompts)} prompts; give one for each")
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise UserError(f"strength {strength} of {steps} steps is no step: raise it, to at most 1, or take more steps")
    scheduler = make_scheduler(model.scheduler, steps)
    first_step = steps - int(steps * strength)
    latents_BZhw = model.encode_images(images_BCHW, generator)
    noise_BZhw = draw_noise(latents_BZhw.shape, generator, model.device)
    x_BZhw = scheduler.add_noise(latents_BZhw, noise_BZhw, first_step)
    context_BME, empty_BME = model.encode_prompts(prompts), model.encode_prompts([negative] * len(prompts))
    x_BZhw = denoise(model.unet, scheduler, x_BZhw, context_BME, empty_BME, guidance, generator, first_step)
    return model.decode_latents(x_BZhw)


def _latent_size(model: LatentDiffusion, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        side = model.unet.config.sample_size
        if side is None:
            raise UserError("the UNet's config.json names no sample_size: give the size of the images")
        return side, side
    factor = model.autoencoder.config.factor
    if size[0] % factor or size[1] % factor or min(size) < factor:
        raise UserError(f"an image of {size[0]} × {size[1]} pixels: both must be multiples of {factor}")
    return size[0] // factor, size[1] // factor
