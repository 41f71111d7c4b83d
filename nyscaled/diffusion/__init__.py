"""Stable Diffusion as NNX modules, read from and written to folders of diffusers."""

from nyscaled.diffusion.loading import load_unet, save
from nyscaled.diffusion.samplers import sample, trajectory
from nyscaled.diffusion.schedule import Schedule
from nyscaled.diffusion.unet import UNet
from nyscaled.diffusion.unet_config import UNetConfig

__all__ = ["Schedule", "UNet", "UNetConfig", "load_unet", "sample", "save", "trajectory"]
