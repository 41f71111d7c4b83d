"""Stable Diffusion as NNX modules, read from and written to folders of diffusers."""

from nyscaled.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from nyscaled.diffusion.generation import generate
from nyscaled.diffusion.loading import load_unet
from nyscaled.diffusion.objective import denoising_loss
from nyscaled.diffusion.pipeline import Pipeline, load, outline, save
from nyscaled.diffusion.samplers import sample, trajectory
from nyscaled.diffusion.schedule import Schedule
from nyscaled.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from nyscaled.diffusion.unet import UNet
from nyscaled.diffusion.unet_config import UNetConfig

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Pipeline",
    "Schedule",
    "TextEncoder",
    "TextEncoderConfig",
    "UNet",
    "UNetConfig",
    "denoising_loss",
    "generate",
    "load",
    "load_unet",
    "outline",
    "sample",
    "save",
    "trajectory",
]
