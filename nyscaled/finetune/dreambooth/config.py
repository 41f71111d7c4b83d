"""Settings of a run: the flags of `nyscaled finetune --task dreambooth`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nyscaled.finetune.chosen import require_method, require_options, require_types
from nyscaled.finetune.config import SCHEDULES, Option
from nyscaled.finetune.meshes import sizes_of
from nyscaled.finetune.methods import METHODS, method
from nyscaled.finetune.trackers import TRACKERS
from nyscaled.models.sharding import FSDP
from nyscaled.validation import require_count, require_nonnegative, require_positive

TASK = "dreambooth"
EXPECTED = "nys.finetune.dreambooth.Config (nys.finetune.run takes settings of other tasks)"
"""What its functions take, for messages."""
TARGETS = r".*\.transformer_blocks\..*\.(to_q|to_k|to_v|to_out\.0)"
TEXT_TARGETS = r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
CROPS = ("random", "center")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; the text below each is its help on the command line.

    The defaults are those of Li, Zhang, Mokhtari and He (2025, their Table 3): rank 4, 500 steps of
    one image, a constant rate of 1e-4.
    """

    task: str = TASK
    """Task: dreambooth, the one with these options."""
    model: str
    """Pipeline: a folder in the form of diffusers, or a hub id."""
    images: Path
    """Folder of images of the subject, and of nothing else."""
    prompt: str
    """Text that stands for the subject, with a word of its own: "a photo of sks dog"."""
    out: Path
    """Folder for the adapter, the metrics and the checkpoints."""
    method: str = "nora"
    """Method of fine-tuning, one that trains adapters."""
    rank: int = 4
    """Rank of the adapters."""
    alpha: float | None = None
    """α: updates are multiplied by α / rank, for rslora by α / √rank. The default is the rank."""
    targets: str = TARGETS
    """Regular expression for whole paths of layers of the U-Net that get adapters. By default these
    are the attention's."""
    train_text_encoder: bool = False
    """Train adapters of the text encoder's attention too, of the same rank; texts are then encoded
    in each step."""
    scale: float | Literal["auto"] | None = None
    """Size ξ of the start of the methods that have one; "auto" gives the columns of a the length of
    LoRA's in each layer."""
    damping: float | None = None
    """Damping λ of the methods that precondition."""
    ratio: float | None = None
    """Learning rate of b over that of a, for lora+."""
    method_options: Mapping[str, int | float | str] = dataclasses.field(
        default_factory=dict[str, int | float | str]
    )
    """Further numbers and names of the method's start and updates: a mapping in a file, and
    --method-options.NAME VALUE for one of them."""
    learning_rate: float = 1e-4
    """Largest learning rate."""
    schedule: str = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 (linear, cosine)."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises."""
    weight_decay: float = 1e-2
    """Weight decay, apart from the gradient as in AdamW."""
    clip: float | None = 1.0
    """Largest norm of the gradient, None for no limit."""
    steps: int = 500
    """Number of steps."""
    batch_size: int = 1
    """Images of the subject in a step; of its class there are as many more."""
    resolution: int | None = None
    """Side of the images in pixels. By default it is the one that the pipeline was made for, 512 in
    Stable Diffusion 1."""
    crop: str = "random"
    """Which square of an image a step sees: random, or center."""
    min_snr: float | None = None
    """γ of min-SNR weights (5 is usual); by default all times count alike."""
    class_prompt: str | None = None
    """Text of the subject's class, "a photo of a dog", so that the model keeps what it knows of it;
    by default the class is left out."""
    class_images: Path | None = None
    """Folder of images of the class. The base generates those that are missing."""
    class_count: int = 100
    """Number of images of the class."""
    prior_weight: float = 1.0
    """Factor of the loss on images of the class."""
    eval_every: int = 100
    """Steps between losses on fixed times and noises, which can be compared between methods."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics."""
    sample_every: int | None = None
    """Steps between rows of images that the model generates; by default there are none."""
    sample_prompt: str | None = None
    """Text of these images; the default is the subject's."""
    log: str | None = None
    """Program that gets the metrics too, where it is installed: tensorboard, wandb."""
    dtype: str = "float32"
    """Dtype of the base: float32, bfloat16. Adapters are trained in float32."""
    mesh: str | None = None
    """Devices over which the base and its adapters are split, as fsdp=2."""
    remat: bool = False
    """Compute layers again in the backward pass, to save memory."""
    seed: int = 0
    """Seed of the adapters' start, and of all that is drawn in a step."""
    resume: bool = False
    """Go on with the run in the output folder."""
    sweep: str | None = None
    """A setting and its values, as learning_rate=1e-4,3e-4,1e-3: a run for each, in folders of
    their own. A second one after a semicolon gives a grid."""
    dry_run: bool = False
    """Show the images, the layers and the memory, and do not train."""
    config: Path | None = None
    """YAML or TOML file of these options; flags override it."""

    def __post_init__(self) -> None:
        require_types(self)
        for name, known in (
            ("task", (TASK,)),
            ("schedule", SCHEDULES),
            ("crop", CROPS),
            ("dtype", DTYPES),
            ("log", (None, *TRACKERS)),
        ):
            value = getattr(self, name)
            if value not in known:
                listed = ", ".join(filter(None, known))
                raise ValueError(f"{name} is {value!r}; expected one of {listed}")
        for name in _COUNTS:
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), low=1)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (name, value) not in (("scale", "auto"), ("clip", math.inf)):
                require_positive(name, value)
        for name in ("weight_decay", "prior_weight"):
            require_nonnegative(name, getattr(self, name))
        for name in ("seed", "warmup_steps"):
            require_count(name, getattr(self, name))
        for name in ("prompt", "class_prompt", "sample_prompt"):
            text: object = getattr(self, name)
            missing = text is None and name != "prompt"
            if not (missing or (isinstance(text, str) and text.strip())):
                raise ValueError(f"{name} is {text!r}; expected a text")
        if self.sample_prompt is not None and self.sample_every is None:
            raise ValueError(
                f"sample_prompt is {self.sample_prompt!r} and sample_every is None; expected a "
                "number of steps between images, as in --sample-every 100"
            )
        require_options(self.method_options)
        self._require_method()
        self._require_class()
        split = 1 if self.mesh is None else sizes_of(self.mesh).get(FSDP, 1)
        if self.batch_size % split:
            raise ValueError(
                f"mesh is {self.mesh!r} and batch_size is {self.batch_size}; expected a multiple "
                f"of {split}, so that each device has as many images"
            )

    def _require_method(self) -> None:
        if method(self.method).trains != "adapters":
            known = [name for name, each in METHODS.items() if each.trains == "adapters"]
            raise ValueError(
                f"method is {self.method!r}; expected one of {', '.join(known)}, which train "
                "adapters"
            )
        require_method(self)

    def _require_class(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(Config)}
        for name in ("class_images", "class_count", "prior_weight"):
            if self.class_prompt is None and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name} is {str(getattr(self, name))!r} and class_prompt is None; expected "
                    "the text of the class, as in --class-prompt 'a photo of a dog'"
                )


_COUNTS = (
    *("rank", "steps", "batch_size", "resolution", "class_count", "eval_every"),
    *("checkpoint_every", "log_every", "sample_every"),
)
_POSITIVE = ("alpha", "scale", "damping", "ratio", "learning_rate", "clip", "min_snr")

NOT_THE_RUN = (
    *("out", "resume", "dry_run", "eval_every", "checkpoint_every", "log_every"),
    *("sample_every", "sample_prompt", "log"),
)
"""Settings in which a run that goes on may differ from the one that began: none of them changes
what is trained."""


def as_options(config: Config) -> dict[str, Option]:
    """Return the settings as a file of options has them.

    Args:
        config: the configuration.

    Examples:
        >>> config = Config(model="m", images=Path("i"), prompt="a sks", out=Path("o"))
        >>> as_options(config)["images"]
        'i'
    """
    values = dataclasses.asdict(config)
    del values["config"]
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
