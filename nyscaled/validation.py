"""Checks of arguments; each failure says what was got and what was expected.

Shapes and dtypes are static and are always checked. Values are checked where they are known:
not under `jit`, `vmap` or `grad`, where an array is a tracer.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, SupportsIndex, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Key

from nyscaled.lapack import eigh
from nyscaled.linalg import default_rcond
from nyscaled.matrices import as_array, as_factors
from nyscaled.matrices import require_floating as require_floating
from nyscaled.numerics import norm
from nyscaled.typing import Factors


def is_concrete(tree: Any) -> bool:
    """Return whether every leaf of `tree` holds values (none is a tracer or an abstract shape).

    Under `jit` an array does not, even a constant from outside: results from it are traced.
    """
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves):
        return False
    scalars = all(getattr(leaf, "ndim", 0) == 0 for leaf in leaves)
    return scalars or not isinstance(jnp.zeros(()), jax.core.Tracer)


def require_count(name: str, value: object, low: int = 0) -> int:
    """Return `value` as an integer; ValueError unless it is one from `low` to 2³¹ − 1.

    Args:
        name: what errors call the value.
        value: a Python or NumPy integer.
        low: the least value that is allowed.
    """
    try:
        count = -1 if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:  # of a tracer too
        count = -1
    if not low <= count < 2**31:
        raise ValueError(f"{name} is {value!r}; expected an integer ≥ {low}, below 2³¹")
    return count


def require_rank(rank: object, shape: tuple[int, ...], name: str = "rank") -> int:
    """Return `rank` as an integer; ValueError unless 1 ≤ rank ≤ min(shape).

    Args:
        rank: the number of columns of factors, an integer of Python, NumPy or JAX.
        shape: the shape (m, n) of the matrix.
        name: what errors call the rank.
    """
    try:
        count = None if isinstance(rank, bool) else operator.index(cast(SupportsIndex, rank))
    except TypeError:  # of a tracer too
        count = None
    if count is None:
        raise ValueError(f"{name} is {rank!r}; expected an integer")
    if not 1 <= count <= min(shape):
        raise ValueError(
            f"{name} is {count}; expected 1 ≤ {name} ≤ {min(shape)} for a matrix {tuple(shape)}"
        )
    return count


def require_key(name: str, key: object) -> Key[Array, ""]:
    """Return `key`; ValueError unless it is a PRNG key, new or old in style.

    Args:
        name: what errors call the key.
        key: as from `jax.random.key`, or from `jax.random.PRNGKey`.
    """
    if isinstance(key, jax.Array) and key.ndim == 0:
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
    elif isinstance(key, jax.Array | np.ndarray) and key.ndim == 1 and key.dtype == jnp.uint32:
        with contextlib.suppress(TypeError):  # of a length that is not a key's
            jax.random.wrap_key_data(jnp.asarray(key))
            return jnp.asarray(key)
    raise ValueError(f"{name} is {key!r:.80}; expected one key, as from jax.random.key(0)")


def require_scalar(
    name: str, value: Any, low: float, high: float, *, open_low: bool, schedule: bool = False
) -> None:
    """Raise ValueError if the value of `value` is known and lies outside the interval.

    Args:
        name: what errors call the value.
        value: a number; the values of tracers and schedules are not checked.
        low: the lower end of the interval.
        high: the upper end, which belongs to the interval unless it is infinite.
        open_low: whether the lower end is excluded.
        schedule: whether `value` may be an optax schedule.
    """
    expected = "expected a number in " + _interval(low, high, open_low)
    if value is None or isinstance(value, str | bytes):  # float() would read a string
        raise ValueError(f"{name} is {value!r}; {expected}")
    if getattr(value, "ndim", 0):
        raise ValueError(f"{name} is an array of shape {value.shape}; {expected}")
    if callable(value) and not schedule:
        raise ValueError(f"{name} is a function; {expected}")
    if callable(value) or not is_concrete(value):
        return
    # float() would read texts in arrays too, take a boolean as 0 or 1, and drop imaginary parts.
    real = (np.dtype(object), jnp.floating, jnp.integer)
    dtype = getattr(value, "dtype", real[0])
    if isinstance(value, bool) or not any(jnp.issubdtype(dtype, kind) for kind in real):
        raise ValueError(f"{name} is {value!r}; {expected}")
    try:
        number = float(value)
    except TypeError:
        raise ValueError(f"{name} is a {type(value).__name__}; {expected}") from None
    except OverflowError:
        raise ValueError(
            f"{name} is an integer that no float holds; expected a smaller one"
        ) from None
    inside = (low < number if open_low else low <= number) and number <= high
    if not inside or not math.isfinite(number):
        raise ValueError(f"{name} is {number:g}; {expected}")


def _interval(low: float, high: float, open_low: bool) -> str:
    return f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError if the value of `value` is known and is not positive."""
    require_scalar(name, value, 0, math.inf, open_low=True)


def require_nonnegative(name: str, value: Any) -> None:
    """Raise ValueError if the value of `value` is known and is negative."""
    require_scalar(name, value, 0, math.inf, open_low=False)


def require_transformation(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an optax transformation."""
    if not all(callable(getattr(value, name, None)) for name in ("init", "update")):
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected an optax transformation, such as "
            "optax.sgd(0.1)"
        )


def require_at_least(name: str, value: Any, low: float) -> None:
    """Raise ValueError if the value of `value` is known and is less than `low`."""
    require_scalar(name, value, low, math.inf, open_low=False)


def require_factor(name: str, x: object, shape: tuple[int, ...], side: int = 0) -> Array:
    """Return `x` as a factor of a matrix of this shape; ValueError if it cannot be one.

    Args:
        name: what errors call the factor.
        x: a matrix (m, r), or (n, r) for the right factor.
        shape: the shape (m, n) of the matrix.
        side: 0 for the left factor and 1 for the right one.
    """
    x = as_array(name, x)
    if x.ndim != 2 or x.shape[0] != shape[side]:
        raise ValueError(f"{name} has shape {x.shape}; expected ({shape[side]}, r) for A {shape}")
    require_rank(x.shape[1], shape)
    require_floating(name, x)
    return x


def require_factors(factors: object, shape: tuple[int, ...]) -> Factors:
    """Return `factors` as a pair of factors of a matrix of this shape; ValueError if it is none."""
    left, right = as_factors(factors)
    left = require_factor("left", left, shape, side=0)
    right = require_factor("right", right, shape, side=1)
    if left.shape[1] != right.shape[1]:
        got = f"{left.shape} and {right.shape}"
        raise ValueError(f"left and right have shapes {got}; expected as many columns in both")
    return Factors(left, right)


def require_spectrum(spectrum: ArrayLike, count: int) -> None:
    """Raise ValueError unless the spectrum is a vector of this many values, the diagonal of Σ.

    Args:
        spectrum: eigenvalues or singular values; a matrix, or one value, would broadcast.
        count: how many there must be.
    """
    if jnp.shape(spectrum) != (count,):
        raise ValueError(
            f"spectrum has shape {jnp.shape(spectrum)}; expected ({count},), the diagonal of Σ"
        )


def require_sound_matrix(name: str, a: Any, *, symmetric: bool) -> None:
    """Raise ValueError on NaN, Inf, an all-zero or (if `symmetric`) a non-Hermitian matrix.

    It takes four products with random vectors, so it costs less than one step, for operators
    too.
    """
    if not is_concrete(a):
        return
    probe = probe_of(a.shape[1], a.dtype)
    with jax.default_matmul_precision("highest"):
        image = a @ probe
    require_sound_image(name, probe, image, symmetric=symmetric)


def probe_of(n: int, dtype: DTypeLike) -> Array:
    """Return four Gaussian vectors, with which matrices are multiplied that are checked.

    Args:
        n: their length.
        dtype: of their entries.
    """
    return jax.random.normal(jax.random.key(0), (n, 4), dtype)


def require_sound_image(
    name: str, probe: Array, image: Array, *, symmetric: bool, rounding: float = 0.0
) -> None:
    """Raise ValueError as `require_sound_matrix` does, from known products with random vectors.

    The antisymmetric part is seen through Uᴴ(A − Aᴴ)U, almost surely non-zero when it is.

    Args:
        name: what errors call the matrix.
        probe: four Gaussian vectors U.
        image: A U.
        symmetric: whether A must be Hermitian.
        rounding: relative rounding error of the products, if it is more than that of their dtype.
    """
    size, dtype = float(norm(image)), image.dtype
    if not math.isfinite(size):
        raise ValueError(
            f"{name} has NaN or Inf entries (or its products overflow {dtype}); expected finite "
            "ones"
        )
    if size == 0.0:
        tiny = float(jnp.finfo(dtype).tiny)
        shape = len(image), len(probe)
        raise ValueError(
            f"{name} is the zero matrix {shape}, or its products with numbers of size 1 "
            f"are below {tiny:.1e}, which {dtype} takes as zero; expected a non-zero one"
        )
    if not symmetric:
        return
    with jax.default_matmul_precision("highest"):
        form = probe.conj().T @ image
    require_digits(size / 2, dtype)  # ‖A U‖_F ≈ 2‖A‖_F for four Gaussian columns
    skew = float(jnp.max(jnp.abs(form - form.conj().T)))
    # Entries of UᵀEU have the size of ‖E‖_F.
    if skew > max(1e3 * float(jnp.finfo(dtype).eps), 8 * rounding) * size:
        if jnp.iscomplexobj(form):
            raise ValueError(
                f"{name} is not Hermitian: A − Aᴴ is about {skew / size:.1e} of its norm; expected "
                "A = Aᴴ (take (A + A.conj().T) / 2 if the difference is rounding)"
            )
        raise ValueError(
            f"{name} is not symmetric: its antisymmetric part is about {skew / size:.1e} of its "
            "norm; expected A = Aᵀ (take (A + A.T) / 2 if the difference is rounding, "
            "or problems.Asymmetric)"
        )


def require_digits(size: float, dtype: DTypeLike) -> None:
    """Raise ValueError if products with a matrix of this norm underflow in part.

    Args:
        size: the norm of A.
        dtype: the dtype of the products.
    """
    limit = float(jnp.finfo(dtype).tiny) / float(jnp.finfo(dtype).eps)
    if size < limit:
        raise ValueError(
            f"A has a norm of about {size:.1e}, where {dtype} loses digits; expected at least "
            f"{limit:.1e} (multiply A by a power of two)"
        )


def require_semidefinite(form: Any, m: int) -> None:
    """Raise ValueError if a known compression ΩᵀAΩ of A has a negative eigenvalue."""
    if not is_concrete(form):
        return
    values, _ = eigh(form)
    low, high = float(values[0]), float(jnp.max(jnp.abs(values)))
    if low < -10 * default_rcond(m, form.dtype) * high:
        raise ValueError(
            f"A is not positive semidefinite: xᵀAx takes the values {low:.2e} … "
            f"{float(values[-1]):.2e} on the sketched subspace; expected a PSD "
            "matrix (problems.Asymmetric takes any)"
        )


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))


def require_finite(name: str, tree: Any) -> None:
    """Raise ValueError if a known array of `tree` has NaN or Inf entries."""
    if not is_concrete(tree):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = name + jax.tree_util.keystr(path)
        if not bool(_all_finite(as_array(where, leaf))):
            raise ValueError(f"{where} has NaN or Inf entries; expected finite ones")
