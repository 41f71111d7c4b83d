"""Fine-tune the U-Net of Stable Diffusion on images of a subject, as DreamBooth does.

IMAGES is a folder of a few images, and PROMPT a text with a word of its own for what they show. OUT
gets the adapter in diffusers' format, metrics, settings and checkpoints. The adapter is that of the
last step: there are no images for validation, of which the best could be chosen.

examples:
  nyscaled finetune --task dreambooth --model stable-diffusion-v1-4 --images dog --out runs/dog \\
      --prompt "a photo of sks dog" --method nora+ --sample-every 100
  nyscaled finetune --config runs/dog/config.yaml --resume
  nyscaled finetune --config runs/dog/config.yaml --out runs/2 --class-prompt "a photo of a dog"
  nyscaled finetune --config runs/dog/config.yaml --out runs/3 --dry-run
  nyscaled finetune --config runs/dog/config.yaml --out sweep --sweep learning_rate=1e-4,3e-4,1e-3
"""

from __future__ import annotations

from nyscaled.cli.finetune import made
from nyscaled.finetune import dreambooth
from nyscaled.finetune.dreambooth import Config as Config
from nyscaled.finetune.dreambooth import Result
from nyscaled.finetune.dreambooth.step import LOSS


def run(config: Config) -> int:
    """Fine-tune; return 0, or 130 after an interruption that saved the state.

    Args:
        config: the settings.

    Raises:
        ValueError: on settings, images and models that do not go together.
        OSError: if a file cannot be read or written.
    """
    return made(config, dreambooth.preview, lambda config: _line(dreambooth.run(config)))


def _line(result: Result) -> str:
    return (
        f"{result.out / 'adapter'}: {result.steps} steps in {result.seconds:.1f} s; the "
        f"{LOSS} went from {result.base_loss:.4f} to {result.loss:.4f}; the saved "
        f"adapter was read again, and its predictions differ by {result.difference:.1g}"
    )
