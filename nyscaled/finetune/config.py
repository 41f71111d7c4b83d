"""Settings of a run of fine-tuning: the flags of `nyscaled finetune`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nyscaled.finetune.chosen import require_options, require_types
from nyscaled.finetune.meshes import sizes_of
from nyscaled.finetune.processes import parsed
from nyscaled.finetune.trackers import TRACKERS
from nyscaled.models.sharding import FSDP
from nyscaled.validation import require_count, require_positive, require_scalar

Option = bool | int | float | str | Mapping[str, int | float | str] | None

SCHEDULES = ("constant", "linear", "cosine")
LOSS_ON = ("answer", "all")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run; the text below each is its help on the command line."""

    model: str
    """Model: a folder, a GGUF file or a hub id."""
    data: Path
    """File or folder of examples."""
    task: str
    """Task: how examples become prompts and answers."""
    template: str | None = None
    """Template of the prompts; the task's first by default."""
    out: Path
    """Folder for the adapter, the metrics and the checkpoints."""
    method: str = "nora"
    """Method of fine-tuning."""
    rank: int = 8
    """Rank of the adapters."""
    alpha: float | None = None
    """α: updates are multiplied by α / rank, for rslora by α / √rank. The default is twice the
    rank."""
    targets: str | None = None
    """Regular expression for whole paths of layers that get adapters. By default all linear layers
    of the stack."""
    dropout: float = 0.0
    """Dropout of the inputs of adapters."""
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
    --method-options.NAME VALUE for one of them, as --method-options.virtual-tokens 10 for
    prefix."""
    learning_rate: float | None = None
    """Largest learning rate; the default is a rule of thumb of the method."""
    schedule: str = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 (linear, cosine)."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises, not more than all; the default is 3 % of them."""
    weight_decay: float = 0.0
    """Weight decay, apart from the gradient as in AdamW."""
    clip: float | None = 1.0
    """Largest norm of the gradient, None for no limit."""
    steps: int | None = None
    """Number of steps; overrides the epochs."""
    epochs: float = 3.0
    """Number of passes through the examples."""
    batch_size: int = 16
    """Examples in a step; all of them where there are fewer."""
    micro_batch_size: int | None = None
    """Examples in memory at one time, a divisor of the batch size. The result is the same."""
    max_length: int = 512
    """Most tokens of an example; the prompt's middle is cut, and never the answer."""
    allow_cut: float = 0.01
    """Share of examples that may be longer than that."""
    loss_on: str = "answer"
    """Tokens that the loss counts: those of the answer, or all. Where candidates or classes are
    compared, it is answer."""
    train_examples: int | None = None
    """Examples to train on; all by default."""
    validation_examples: int | None = 500
    """Most examples for validation; None for all."""
    test_examples: int | None = 1000
    """Most examples for the scores at the end; None for all."""
    eval_every: int | None = None
    """Steps between validations; the default is an epoch."""
    patience: int | None = None
    """Validations without a lower loss after which the run stops; by default it goes on."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; the default is that between validations, 500 at most."""
    log_every: int = 10
    """Steps between lines of metrics."""
    sample_every: int | None = None
    """Steps between texts that the model generates for three examples of validation; by default
    there are none."""
    log: str | None = None
    """Program that gets the metrics too, where it is installed: tensorboard, wandb."""
    dtype: str = "float32"
    """Dtype of the base: float32, bfloat16, float16. Adapters are trained in float32."""
    mesh: str | None = None
    """Devices over which the base and its adapters are split, as fsdp=8 or fsdp=4,tensor=2."""
    processes: str | None = None
    """Make this process one of several, which share each batch: the address of the first one, their
    number and the index of this one, as in 10.0.0.1:8476,2,0; or auto on a cluster that JAX
    knows."""
    remat: bool = False
    """Compute layers again in the backward pass, to save memory."""
    seed: int = 0
    """Seed of the adapters' start, the order of the examples and dropout."""
    resume: bool = False
    """Go on with the run in the output folder."""
    sweep: str | None = None
    """A setting and its values, as learning_rate=1e-4,3e-4,1e-3: a run for each, in folders of
    their own. A second one after a semicolon gives a grid."""
    dry_run: bool = False
    """Show the data, the layers, the memory and the time, and do not train."""
    config: Path | None = None
    """YAML or TOML file of these options; flags override it."""

    def __post_init__(self) -> None:
        require_types(self)
        for name, known in (("schedule", SCHEDULES), ("loss_on", LOSS_ON), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.log not in (None, *TRACKERS):
            raise ValueError(f"log is {self.log!r}; expected one of {', '.join(TRACKERS)}")
        for name in ("rank", "batch_size", "max_length", "log_every"):
            require_count(name, getattr(self, name), low=1)
        for name in _COUNTS:
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), low=1)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (name, value) not in (("scale", "auto"), ("clip", math.inf)):
                require_positive(name, value)
        require_options(self.method_options)
        require_count("seed", self.seed)
        if self.warmup_steps is not None:
            require_count("warmup_steps", self.warmup_steps)
        require_scalar("dropout", self.dropout, 0, 1, open_low=False)
        require_scalar("allow_cut", self.allow_cut, 0, 1, open_low=False)
        require_scalar("weight_decay", self.weight_decay, 0, math.inf, open_low=False)
        if self.processes is not None:
            parsed(self.processes)
            if self.sweep is not None:
                raise ValueError(
                    f"sweep is {self.sweep!r} and processes {self.processes!r}; expected one of "
                    "them (several processes make one run)"
                )
        if self.mesh is not None:
            split, size = sizes_of(self.mesh).get(FSDP, 1), self.micro_batch_size or self.batch_size
            if size % split:
                raise ValueError(
                    f"mesh is {self.mesh!r} and a micro-batch has {size} examples; expected a "
                    f"multiple of {split}, so that each device has as many"
                )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; expected a divisor of batch_size, "
                f"{self.batch_size}"
            )


_COUNTS = (
    "steps",
    "micro_batch_size",
    "train_examples",
    "validation_examples",
    "test_examples",
    "eval_every",
    "patience",
    "checkpoint_every",
    "sample_every",
)
_POSITIVE = ("alpha", "scale", "damping", "ratio", "learning_rate", "clip", "epochs")

NOT_THE_RUN = (
    *("out", "resume", "dry_run", "checkpoint_every", "log_every", "sample_every", "log"),
    "processes",
)
"""Settings in which a run that goes on may differ from the one that began."""


def as_options(config: Config) -> dict[str, Option]:
    """Return the settings as a file of options has them.

    Args:
        config: the configuration.

    Examples:
        >>> as_options(Config(model="m", data=Path("d"), task="rte", out=Path("o")))["data"]
        'd'
    """
    values = dataclasses.asdict(config)
    del values["config"]
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
