"""nyscaled: ScaledGD from Nyström starts, low-rank factorization, and NoRA adapters, in JAX."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from nyscaled import dynamics as dynamics
from nyscaled import initializers as initializers
from nyscaled import lapack as lapack
from nyscaled import linalg as linalg
from nyscaled import numerics as numerics
from nyscaled import optimality as optimality
from nyscaled import problems as problems
from nyscaled import solvers as solvers
from nyscaled import spectra as spectra
from nyscaled.balance import reflora as reflora
from nyscaled.balance import reflora_s as reflora_s
from nyscaled.balance import scale_by_balance as scale_by_balance
from nyscaled.pairing import FactorSpec as FactorSpec
from nyscaled.pairing import default_spec as default_spec
from nyscaled.pairing import pair_spec as pair_spec
from nyscaled.precgd import precgd as precgd
from nyscaled.precgd import scale_by_residual_gram as scale_by_residual_gram
from nyscaled.precondition import lora_p as lora_p
from nyscaled.precondition import nora_plus as nora_plus
from nyscaled.precondition import scale_by_gram as scale_by_gram
from nyscaled.precondition import scale_by_normalized_gram as scale_by_normalized_gram
from nyscaled.precondition import scaled_gd as scaled_gd
from nyscaled.typing import Factors as Factors

if _TYPE_CHECKING:
    from nyscaled import lora as lora
    from nyscaled import models as models

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    # Flax and safetensors are wanted by these alone, and imported when first asked for.
    if name not in ("lora", "models"):
        raise AttributeError(f"module 'nyscaled' has no attribute {name!r}")
    try:
        return _importlib.import_module(f"nyscaled.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"nyscaled.{name} needs {error.name}: pip install 'nyscaled[{name}]'"
        ) from error
