"""Starts of an adapter from the kernel W_0 of its layer.

Each is a function `(key, kernel, rank, scaling, **options) -> Start(a, b)` of one matrix: kernel
(in, out), a (in, r), b (r, out). The layer adds s·a·b with s = `scaling` (α/r or α/√r). If neither
factor is zero (None), the caller subtracts the product of the start again, so that training starts
at W_0. Starts from gradients are in `gradient_inits.py`.

References:
    Hu et al., LoRA, ICLR 2022. Meng, Wang, Zhang, PiSSA, NeurIPS 2024. Büyükakyüz, OLoRA, 2024.
    Wang, Li, Wang, Chen, Chen, MiLoRA: Harnessing minor singular components, 2024.
    NoRA is Algorithm 1 of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from nyscaled import lapack, validation
from nyscaled.initializers import random_sketch
from nyscaled.linalg import orthonormalize
from nyscaled.linalg.subspace import OVERSAMPLING, range_basis
from nyscaled.numerics import full_precision, norm
from nyscaled.typing import Sketch

KAIMING = 3**-0.5
"""Root mean square length of the columns of `a` in LoRA's Kaiming start."""


class Start(NamedTuple):
    """The factors that an adapter starts from, float32 at least; None stands for zeros."""

    a: Float[Array, "m r"] | None
    b: Float[Array, "r n"] | None


Init = Callable[..., Start]


def _dtype(kernel: Array) -> jnp.dtype:
    return jnp.promote_types(kernel.dtype, jnp.float32)


def _times(x: Array, y: Array) -> Array:
    """x @ y accumulated in float32 at least, without a float32 copy of a bfloat16 kernel."""
    narrow = min(x.dtype, y.dtype, key=lambda d: jnp.dtype(d).itemsize)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return jnp.matmul(x.astype(narrow), y.astype(narrow), preferred_element_type=wide)


def lora(
    key: Key[Array, ""],
    kernel: Float[Array, "m n"],
    rank: int,
    scaling: float,
    *,
    distribution: str = "kaiming",
) -> Start:
    """LoRA: a random a, b = 0.

    Args:
        key: PRNG key.
        kernel: W_0, of which only the shape is used.
        rank: r.
        scaling: s; not used.
        distribution: "kaiming" for U(±1/√m) or "gaussian" for N(0, 1/r²), both as in PEFT.

    Examples:
        >>> start = lora(jax.random.key(0), jnp.ones((6, 4)), 2, 1.0)
        >>> start.a.shape, start.b
        ((6, 2), None)
    """
    m = kernel.shape[0]
    if distribution == "kaiming":
        a = jax.random.uniform(key, (m, rank), _dtype(kernel), -1, 1) / m**0.5
    elif distribution == "gaussian":
        a = jax.random.normal(key, (m, rank), _dtype(kernel)) / rank
    else:
        raise ValueError(f"distribution is {distribution!r}; expected 'kaiming' or 'gaussian'")
    return Start(a, None)


@full_precision
def nora(
    key: Key[Array, ""],
    kernel: Float[Array, "m n"],
    rank: int,
    scaling: float,
    *,
    scale: float | str = 0.1,
    sketch: Sketch = "gaussian",
    side: str = "input",
) -> Start:
    """NoRA (Algorithm 1): a = W_0Ω/s, b = 0, with Ω ~ N(0, ξ²), ξ = `scale`.

    With scale="auto" there is no ξ to tune: in each layer W_0Ω is multiplied so that the columns of
    a have the root mean square length 3^-½, which is that of LoRA's Kaiming start.

    Args:
        key: PRNG key for Ω.
        kernel: W_0.
        rank: r.
        scaling: s; the start is divided by it.
        scale: ξ, which the paper tunes among 0.02, 0.05, 0.1, 0.2; or "auto".
        sketch: "gaussian", or "stiefel" for ξ times an orthonormal Ω.
        side: "input" as above. "output" is the same for W_0ᵀ: a = 0, b = ΩᵀW_0/s.

    Examples:
        >>> start = nora(jax.random.key(0), jnp.eye(6), 2, 1.0, scale=0.1, sketch="stiefel")
        >>> jnp.round(start.a.T @ start.a, 4)
        Array([[0.01, 0.  ],
               [0.  , 0.01]], dtype=float32)
    """
    if side not in ("input", "output"):
        raise ValueError(f"side is {side!r}; expected 'input' or 'output'")
    if isinstance(scale, str) and scale != "auto":
        raise ValueError(f"scale is {scale!r}; expected a positive number or 'auto'")
    size = 1.0 if scale == "auto" else scale
    omega = random_sketch(key, kernel.shape[side == "input"], rank, size, sketch, _dtype(kernel))
    image = _times(*((kernel, omega) if side == "input" else (omega.T, kernel)))
    if scale == "auto":
        length = norm(image)
        image = image * (KAIMING * rank**0.5 / jnp.where(length > 0, length, 1))
    else:
        image = image / scaling
    return Start(image, None) if side == "input" else Start(None, image)


@full_precision
def pissa(
    key: Key[Array, ""],
    kernel: Float[Array, "m n"],
    rank: int,
    scaling: float,
    *,
    niter: int | None = None,
) -> Start:
    """PiSSA: s·a·b is the best rank-r approximation of W_0, balanced.

    Args:
        key: PRNG key of the randomized form; not used by the exact one.
        kernel: W_0.
        rank: r.
        scaling: s.
        niter: number of power iterations of a randomized SVD, which needs only products with W_0
            (PEFT's `pissa_niter_4` is 4). None computes a full SVD by LAPACK.

    Examples:
        >>> start = pissa(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0])), 1, 1.0)
        >>> jnp.round(start.a @ start.b, 4)
        Array([[4., 0.],
               [0., 0.]], dtype=float32)
    """
    if niter is None:
        u, s, vt = lapack.svd(kernel.astype(_dtype(kernel)))
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    else:
        niter = validation.require_count("niter", niter)
        columns = min(rank + OVERSAMPLING, *kernel.shape)
        omega = jax.random.normal(key, (kernel.shape[1], columns), _dtype(kernel))

        def rows(basis: Array) -> Array:
            """basisᵀ @ kernel; see `matrices.transpose_times` for the barrier."""
            return jax.lax.optimization_barrier(_times(basis.T, kernel))

        basis = range_basis(
            lambda x: _times(kernel, x),
            lambda x: rows(x).T,
            omega,
            niter,
            orthonormalize,
            unroll=True,
        )
        u, s, vt = _leading(basis, rows(basis), rank)
    return _balanced(u, s / scaling, vt)


@full_precision
def milora(key: Key[Array, ""], kernel: Float[Array, "m n"], rank: int, scaling: float) -> Start:
    """MiLoRA: s·a·b is the part of W_0 of its r smallest singular values, balanced.

    The gradients of triples whose singular value is zero vanish, so that W_0 should be of full
    rank.

    Args:
        key: PRNG key; not used.
        kernel: W_0.
        rank: r.
        scaling: s.

    Examples:
        >>> start = milora(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0])), 1, 1.0)
        >>> jnp.round(start.a @ start.b, 4)
        Array([[0., 0.],
               [0., 1.]], dtype=float32)
    """
    u, s, vt = lapack.svd(kernel.astype(_dtype(kernel)))
    return _balanced(u[:, -rank:], s[-rank:] / scaling, vt[-rank:])


def _balanced(u: Array, s: Array, vt: Array) -> Start:
    """u·diag(s)·vt as two factors of equal singular values."""
    root = jnp.sqrt(s)
    return Start(u * root, root[:, None] * vt)


def _leading(basis: Array, compressed: Array, rank: int) -> tuple[Array, Array, Array]:
    """The leading singular triples of basis @ compressed, by an SVD of the side of `basis`."""
    rows = orthonormalize(compressed.T)
    u, s, vt = lapack.svd(compressed @ rows)
    return basis @ u[:, :rank], s[:rank], vt[:rank] @ rows.T


@full_precision
def olora(key: Key[Array, ""], kernel: Float[Array, "m n"], rank: int, scaling: float) -> Start:
    """OLoRA: W_0ᵀ = QR, b = Q_rᵀ, a = R_rᵀ = W_0Q_r.

    Args:
        key: PRNG key; not used.
        kernel: W_0.
        rank: r.
        scaling: s; not used.
    """
    # Q_r depends on the first r rows of W_0 only.
    leading = orthonormalize(kernel[:rank].astype(_dtype(kernel)).T)
    return Start(_times(kernel, leading), leading.T)


@full_precision
def orthogonal(
    key: Key[Array, ""], kernel: Float[Array, "m n"], rank: int, scaling: float
) -> Start:
    """PEFT's "orthogonal": a and b Gaussian in complementary halves of a random basis, so a·b ≈ 0.

    Args:
        key: PRNG key.
        kernel: W_0, of which only the shape is used.
        rank: r, an even number.
        scaling: s; not used.

    Raises:
        ValueError: on an odd rank.
    """
    if rank % 2:
        raise ValueError(f"rank is {rank}; expected an even one for the init 'orthogonal'")
    (m, n), dtype = kernel.shape, _dtype(kernel)
    first, second, third = jax.random.split(key, 3)
    q = lapack.orthogonal(first, rank, rank, dtype)
    a = jax.random.normal(second, (m, rank // 2), dtype) @ q[0::2]
    b = q[1::2].T @ jax.random.normal(third, (rank // 2, n), dtype)
    return Start(a / 10, b / 10)


KERNEL_INITS: dict[str, Init] = {
    "lora": lora,
    "nora": nora,
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "orthogonal": orthogonal,
}
