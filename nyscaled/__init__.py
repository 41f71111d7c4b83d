"""nyscaled: ScaledGD from Nyström starts, low-rank factorization, and NoRA adapters, in JAX."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from nyscaled import (
    dynamics,
    initializers,
    lapack,
    linalg,
    lowrank,
    numerics,
    optimality,
    problems,
    solvers,
    spectra,
    transforms,
)
from nyscaled.lowrank import factorize, nystrom
from nyscaled.transforms import (
    FactorSpec,
    default_spec,
    lora_p,
    lora_plus,
    lora_rite,
    nora_plus,
    pair_spec,
    precgd,
    reflora,
    reflora_s,
    scale_by_balance,
    scale_by_gram,
    scale_by_gram_pinv,
    scale_by_normalized_gram,
    scale_by_residual_gram,
    scale_by_rite,
    scaled_gd,
)
from nyscaled.typing import Factors

if _TYPE_CHECKING:
    from nyscaled import diffusion as diffusion
    from nyscaled import finetune as finetune
    from nyscaled import lora as lora
    from nyscaled import models as models
    from nyscaled import sklearn as sklearn

__version__ = "0.1.0"

__all__ = [
    "FactorSpec",
    "Factors",
    "default_spec",
    "dynamics",
    "factorize",
    "initializers",
    "lapack",
    "linalg",
    "lora_p",
    "lora_plus",
    "lora_rite",
    "lowrank",
    "nora_plus",
    "numerics",
    "nystrom",
    "optimality",
    "pair_spec",
    "precgd",
    "problems",
    "reflora",
    "reflora_s",
    "scale_by_balance",
    "scale_by_gram",
    "scale_by_gram_pinv",
    "scale_by_normalized_gram",
    "scale_by_residual_gram",
    "scale_by_rite",
    "scaled_gd",
    "solvers",
    "spectra",
    "transforms",
]


def __getattr__(name: str) -> _Any:
    # Only these rooms require Flax, safetensors and scikit-learn, imported at the first use.
    if name not in ("diffusion", "finetune", "lora", "models", "sklearn"):
        raise AttributeError(f"module 'nyscaled' has no attribute {name!r}")
    try:
        return _importlib.import_module(f"nyscaled.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"nyscaled.{name} needs {error.name}: pip install 'nyscaled[{name}]'"
        ) from error
