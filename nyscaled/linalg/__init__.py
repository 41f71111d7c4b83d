"""Linear algebra of thin factors, and of matrices that are known by their products."""

from nyscaled.linalg import kernels
from nyscaled.linalg.kernels import KernelMatrix
from nyscaled.linalg.maps import probed_norm, residual, spectral_norm, squared_residual
from nyscaled.linalg.subspace import leading_factors
from nyscaled.linalg.thin import (
    Compressed,
    ThinFactorization,
    compress,
    default_rcond,
    dual,
    factor,
    gram_solve,
    moving_frame,
    orthonormalize,
    pinv,
)
from nyscaled.matrices import symmetric_part
from nyscaled.operators import Operator

__all__ = [
    "Compressed",
    "KernelMatrix",
    "Operator",
    "ThinFactorization",
    "compress",
    "default_rcond",
    "dual",
    "factor",
    "gram_solve",
    "kernels",
    "leading_factors",
    "moving_frame",
    "orthonormalize",
    "pinv",
    "probed_norm",
    "residual",
    "spectral_norm",
    "squared_residual",
    "symmetric_part",
]
