"""nyscaled: ScaledGD from Nyström starts, low-rank factorization, and NoRA adapters, in JAX."""

from nyscaled import dynamics as dynamics
from nyscaled import initializers as initializers
from nyscaled import linalg as linalg
from nyscaled import optimality as optimality
from nyscaled import problems as problems
from nyscaled import solvers as solvers
from nyscaled import spectra as spectra
from nyscaled.pairing import FactorSpec as FactorSpec
from nyscaled.pairing import default_spec as default_spec
from nyscaled.pairing import pair_spec as pair_spec
from nyscaled.precondition import nora_plus as nora_plus
from nyscaled.precondition import scale_by_gram as scale_by_gram
from nyscaled.precondition import scale_by_normalized_gram as scale_by_normalized_gram
from nyscaled.precondition import scaled_gd as scaled_gd
from nyscaled.typing import Factors as Factors

__version__ = "0.1.0"
