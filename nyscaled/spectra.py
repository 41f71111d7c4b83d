"""Random matrices with a prescribed spectrum; the paper's four by name (its Appendix E.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from nyscaled.lapack import orthogonal
from nyscaled.numerics import full_precision
from nyscaled.typing import Values
from nyscaled.validation import is_concrete, require_floating

__all__ = [
    "paper",
    "paper_spectrum",
    "psd",
    "rectangular",
]

_EXACT = (*(1.0 - 0.01 * i for i in range(19)), 0.01)
_UNDER = (*(1.0 - 0.01 * i for i in range(37)), 0.05, 0.025, 0.01)
_PAPER = {"fig1ab": _EXACT, "fig1c": _UNDER, "fig4a": _EXACT, "fig4b": _EXACT}


def _spectrum(values: Values, limit: int, dtype: DTypeLike | None) -> Float[Array, " k"]:
    spectrum = jnp.asarray(values, dtype or jnp.result_type(float))
    require_floating("spectrum", spectrum)
    if spectrum.ndim != 1 or not 1 <= spectrum.size <= limit:
        raise ValueError(
            f"spectrum has shape {spectrum.shape}; expected 1 to {limit} singular values, (k,)"
        )
    if is_concrete(spectrum):
        known = np.asarray(spectrum, np.float64)
        if not np.all((known > 0) & np.isfinite(known)):
            raise ValueError(f"spectrum is {known}; expected positive finite singular values")
    return spectrum


def random_factor(key: Key[Array, ""], m: int, spectrum: Values, limit: int) -> Float[Array, "m k"]:
    """Return U diag(spectrum)^½ (m, k), U uniform on the Stiefel manifold.

    Args:
        key: a PRNG key.
        m: the number of rows.
        spectrum: the k positive squares of the singular values of the factor.
        limit: the largest k that is allowed.

    Examples:
        >>> random_factor(jax.random.key(0), 5, [2.0, 1.0], limit=5).shape
        (5, 2)
    """
    values = _spectrum(spectrum, limit, None)
    return orthogonal(key, m, values.size, values.dtype) * jnp.sqrt(values)


@full_precision
def psd(
    key: Key[Array, ""], m: int, spectrum: Values, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "m m"], Float[Array, "m k"]]:
    """Return a random A = Q diag(spectrum) Qᵀ with Q uniform on the Stiefel manifold, and Q.

    Args:
        key: PRNG key.
        m: side of A.
        spectrum: its k ≤ m non-zero eigenvalues, all positive, in any order.
        dtype: float32, or float64 where enabled; JAX's default float if None.

    Returns:
        A (m, m), exactly symmetric, and Q (m, k), whose columns go with `spectrum`.

    Raises:
        ValueError: if the spectrum is empty, too long or not positive.

    Examples:
        >>> a, basis = psd(jax.random.key(0), 50, [1.0, 0.5])
        >>> bool(jnp.allclose(a @ basis[:, 1], 0.5 * basis[:, 1], atol=1e-6))
        True
    """
    values = _spectrum(spectrum, m, dtype)
    basis = orthogonal(key, m, values.size, values.dtype)
    a = (basis * values) @ basis.T
    return (a + a.T) / 2, basis


@full_precision
def rectangular(
    key: Key[Array, ""], m: int, n: int, spectrum: Values, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "m n"], Float[Array, "m k"], Float[Array, "n k"]]:
    """Return a random A = U diag(spectrum) Vᵀ (m, n), with its singular vectors U and V.

    Args:
        key: a PRNG key.
        m: the number of rows.
        n: the number of columns.
        spectrum: the non-zero singular values (k,), k ≤ min(m, n).
        dtype: float32 or float64, the dtype of the results.

    Examples:
        >>> a, left, right = rectangular(jax.random.key(0), 6, 5, [2.0, 1.0])
        >>> a.shape, left.shape, right.shape
        ((6, 5), (6, 2), (5, 2))
    """
    values = _spectrum(spectrum, min(m, n), dtype)
    left_key, right_key = jax.random.split(key)
    left = orthogonal(left_key, m, values.size, values.dtype)
    right = orthogonal(right_key, n, values.size, values.dtype)
    return (left * values) @ right.T, left, right


def paper_spectrum(name: str) -> np.ndarray:
    """Return the nonzero singular values of one of the paper's test matrices.

    Args:
        name: "fig1ab", "fig4a", "fig4b" (20 values: 1, 0.99, …, 0.82, 0.01) or
            "fig1c" (40 values: 1, 0.99, …, 0.64, 0.05, 0.025, 0.01).

    Examples:
        >>> paper_spectrum("fig1c").shape
        (40,)
    """
    if name not in _PAPER:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(_PAPER)}")
    return np.array(_PAPER[name])


def paper(
    name: str, key: Key[Array, ""], m: int = 1000, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "m m"], Float[Array, "m k"]]:
    """Return one of the paper's test matrices and its eigenvectors, as `psd` does.

    Args:
        name: the figure, see `paper_spectrum`.
        key: a PRNG key.
        m: the number of rows and columns.
        dtype: float32 or float64, the dtype of the results.

    Examples:
        >>> a, basis = paper("fig1c", jax.random.key(0), m=50)
        >>> a.shape, basis.shape
        ((50, 50), (50, 40))
    """
    return psd(key, m, paper_spectrum(name), dtype)
