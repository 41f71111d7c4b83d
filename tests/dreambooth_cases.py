"""Settings of small runs on images of a subject."""

import shutil

import numpy as np
import safetensors.numpy
from diffusion_cases import FOLDER
from flax import nnx
from PIL import Image

import nyscaled as nys
from nyscaled.finetune import progress

PROMPT = "a photo of sks dog"


def write_model(folder):
    """A pipeline with the smallest U-Net, which has attention between its one level down and up."""
    shutil.copytree(FOLDER / "sd1", folder)
    config = nys.diffusion.UNetConfig(
        sample_size=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=6,
        norm_num_groups=2,
    )
    nys.diffusion.save(nys.diffusion.UNet(config, rngs=nnx.Rngs(0)), folder / "unet")
    return folder


def write_images(folder, count=3, size=(12, 9)):
    """A folder of images with random pixels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"dog{i}.png")
    return folder


def settings(root, **options):
    """Settings of a run of a few steps; the pipeline and the images are written once."""
    model, images = root / "model", root / "images"
    if not model.exists():
        write_model(model)
    if not images.exists():
        write_images(images)
    defaults = {"model": str(model), "images": images, "prompt": PROMPT, "out": root / "out"}
    short = {"steps": 6, "eval_every": 3, "checkpoint_every": 3, "log_every": 2}
    return nys.finetune.dreambooth.Config(**(defaults | short | options))


def lines(out):
    """The metrics without times."""
    metrics = progress.read_metrics(out / progress.METRICS)
    return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics]


def tensors(out):
    values = safetensors.numpy.load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
    return {name: value.tobytes() for name, value in values.items()}


def words(config, *more):
    """The command line of these settings."""
    names = ("model", "images", "prompt", "out", "steps", "eval_every", "log_every")
    names += ("checkpoint_every",)
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(config, name))) for name in names]
    return ["finetune", "--task", "dreambooth", *[word for pair in pairs for word in pair], *more]
