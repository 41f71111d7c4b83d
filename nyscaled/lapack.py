"""Factorizations of single matrices, which under `vmap` on a CPU are made one after another.

jaxlib's LAPACK kernels split a batch over XLA's thread pool and wait for its parts, on a thread of
that pool. As many such calls as the pool has threads wait for one another without end (jaxlib
0.10.2; `docs/upstream/batched_lapack_hang.py`). A batch of one matrix is never split: here batches
are loops on CPUs, and every factorization of the library goes through this file. Derivatives are
made of products and of the functions in this file.

Matrices are divided by a power of two first, so that results do not depend on their scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact, Key

from nyscaled.numerics import full_precision, normalized, shift

_ONE_THREAD = 16  # side of a triangular solve; real ones wake threads from 32 on, complex from 24


_One = tuple[Array]


class _OneAtATime:
    """A primitive for a function of a matrix; of a batch, a loop on CPUs, else the batched kernel.

    It asks for a derivative, by `defjvp`. Being a primitive, it has derivatives of every order and
    in every mode, also inside loops, which a rule of `custom_vmap` under `custom_jvp` has not.
    """

    def __init__(self, fn: Callable[[Array], object]) -> None:
        self._fn = fn
        self._trace = jax.make_jaxpr(self._of_batch, return_shape=True)
        self._primitive = Primitive(fn.__name__)
        self._primitive.multiple_results = True
        self._primitive.def_impl(_evaluate)
        self._primitive.def_abstract_eval(lambda x, program: program.out_avals)
        lowering = mlir.lower_fun(_evaluate, multiple_results=True)
        mlir.register_lowering(self._primitive, lowering)
        batching.primitive_batchers[self._primitive] = self._batch

    def __call__(self, x: Array) -> Any:
        program, shape = self._trace(x)
        return jax.tree.unflatten(
            jax.tree.structure(shape), self._primitive.bind(x, program=program)
        )

    def _of_batch(self, x: Array) -> object:
        """The function of a matrix (m, n), or of matrices (…, m, n)."""
        *batch, m, n = x.shape
        if not batch:
            return self._fn(x)

        def loop(x: Array) -> object:
            results = lax.map(self._fn, x.reshape(-1, m, n))
            return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), results)

        return lax.platform_dependent(x, cpu=loop, default=_over_batch(self._fn, x))

    def _batch(
        self, args: Sequence[Array], axes: Sequence[int], program: object
    ) -> tuple[list[Array], list[int]]:
        results = jax.tree.leaves(self(jnp.moveaxis(args[0], axes[0], 0)))
        return results, [0] * len(results)

    def defjvp(self, rule: Callable[[_One, _One], object]) -> Callable[[_One, _One], object]:
        """Take `(primals, tangents) ↦ (results, their derivatives)` of one matrix as the rule."""

        def of_batch(
            primals: Sequence[Array], tangents: Sequence[Array], program: object
        ) -> object:
            results, changes = _over_batch(rule, primals[0])(tuple(primals), tuple(tangents))
            return jax.tree.leaves(results), jax.tree.leaves(changes)

        ad.primitive_jvps[self._primitive] = of_batch
        return rule


def _evaluate(x: Array, program: ClosedJaxpr) -> list[Array]:
    return jaxpr_as_fun(program)(x)


def _over_batch(fn: Callable[..., Any], x: Array) -> Callable[..., Any]:
    """A function of matrices as one of batches with as many axes as `x`."""
    for _ in range(x.ndim - 2):
        fn = jax.vmap(fn)
    return fn


@_OneAtATime
def _svd(x: Array) -> tuple[Array, Array, Array]:
    return tuple(jnp.linalg.svd(x, full_matrices=False))


@_OneAtATime
def _eigh(a: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(a, symmetrize_input=False)
    return values, vectors


@_OneAtATime
def _qr(x: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(x)
    return q, r


_inverse = _OneAtATime(jnp.linalg.inv)


def reciprocal(x: Array) -> Array:
    """Return 1/x, and 0 where x is far below the rounding of a matrix of size 1."""
    small = jnp.abs(x) <= float(jnp.finfo(x.dtype).eps) ** 4
    return jnp.where(small, 0, 1 / jnp.where(small, 1, x))


@_svd.defjvp
@full_precision
def _svd_jvp(primals: _One, tangents: _One) -> object:
    (x,), (dx,) = primals, tangents
    u, s, vt = _svd(x)
    core = u.T @ dx @ vt.T
    gaps = reciprocal((s - s[:, None]) * (s + s[:, None]))
    du = u @ (gaps * (core * s + (core * s).T))
    dvt = (gaps * (core.T * s + (core.T * s).T)).T @ vt
    m, n = x.shape
    if m > n:
        image = dx @ vt.T
        du = du + (image - u @ (u.T @ image)) * reciprocal(s)
    if n > m:
        image = u.T @ dx
        dvt = dvt + reciprocal(s)[:, None] * (image - (image @ vt.T) @ vt)
    return (u, s, vt), (du, jnp.diagonal(core), dvt)


def svd(
    x: Inexact[Array, "m n"],
) -> tuple[Inexact[Array, "m k"], Float[Array, " k"], Inexact[Array, "k n"]]:
    """Return U, the falling singular values and Vᴴ of the thin SVD, k = min(m, n).

    Derivatives are those of real matrices.
    """
    scaled, e = normalized(x)
    u, s, vt = _svd(scaled)
    return u, shift(s, e), vt


@_eigh.defjvp
@full_precision
def _eigh_jvp(primals: _One, tangents: _One) -> object:
    (a,), (da,) = primals, tangents
    values, vectors = _eigh(a)
    core = vectors.conj().T @ da @ vectors
    gaps = reciprocal(values - values[:, None])
    return (values, vectors), (jnp.diagonal(core).real, vectors @ (gaps * core))


def eigh(x: Inexact[Array, "n n"]) -> tuple[Float[Array, " n"], Inexact[Array, "n n"]]:
    """Return the rising eigenvalues and the eigenvectors of the Hermitian part of X.

    Derivatives are those of real matrices.
    """
    scaled, e = normalized((x + x.conj().T) / 2)
    values, vectors = _eigh(scaled)
    return shift(values, e), vectors


@_inverse.defjvp
@full_precision
def _inverse_jvp(primals: _One, tangents: _One) -> object:
    (a,), (da,) = primals, tangents
    inverse = _inverse(a)
    return inverse, -(inverse @ da @ inverse)


def inverse(x: Inexact[Array, "n n"]) -> Inexact[Array, "n n"]:
    """Return X⁻¹ of a square matrix."""
    scaled, e = normalized(x)
    return shift(_inverse(scaled), -e)


@full_precision
def solve(x: Float[Array, "n n"], b: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Return X⁻¹B, with the backward error of an LU factorization (one step of refinement).

    Args:
        x: an invertible matrix X (n, n).
        b: the right-hand sides B (n, k).
    """
    inv = inverse(x)
    y = inv @ b
    return y + inv @ (b - x @ y)


@_qr.defjvp
@full_precision
def _qr_jvp(primals: _One, tangents: _One) -> object:
    (x,), (dx,) = primals, tangents
    q, r = _qr(x)
    image = dx @ inverse(r)
    core = q.T @ image
    lower = jnp.tril(core, -1)
    turn = lower - lower.T
    return (q, r), (q @ (turn - core) + image, (core - turn) @ r)


def qr(x: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """Return Q with orthonormal columns and the upper triangular R, m ≥ n, X of any rank."""
    scaled, e = normalized(x)
    q, r = _qr(scaled)
    return q, shift(r, e)


@_OneAtATime
def _inverse_triangle(upper: Array) -> Array:
    return _inverse_upper(upper)


@_inverse_triangle.defjvp
@full_precision
def _inverse_triangle_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (upper,), (change,) = primals, tangents
    inverse = _inverse_triangle(upper)
    return inverse, -(inverse @ jnp.triu(change) @ inverse)


def inverse_upper(upper: Inexact[Array, "r r"]) -> Inexact[Array, "r r"]:
    """Return R⁻¹ of an upper triangular R."""
    return _inverse_triangle(upper)


@_OneAtATime
def _inverse_cholesky(gram: Array) -> Array:
    return _inverse_upper(lax.linalg.cholesky(gram, symmetrize_input=False).conj().T)


@_inverse_cholesky.defjvp
@full_precision
def _inverse_cholesky_jvp(primals: _One, tangents: _One) -> object:
    (gram,), (change,) = primals, tangents
    t = _inverse_cholesky(gram)
    core = t.T @ change @ t
    return t, -t @ (jnp.triu(core, 1) + jnp.diag(jnp.diagonal(core) / 2))


def inverse_cholesky(gram: Inexact[Array, "r r"]) -> Inexact[Array, "r r"]:
    """Return the upper triangular T with Tᴴ gram T = I."""
    return _inverse_cholesky(gram)


def _inverse_upper(upper: Inexact[Array, "r r"]) -> Inexact[Array, "r r"]:
    """By halves, [A B; 0 C]⁻¹ = [A⁻¹ −A⁻¹BC⁻¹; 0 C⁻¹], down to sizes that one thread solves.

    Larger triangular solves wake the BLAS threads, which costs milliseconds where this takes
    microseconds.
    """
    r = upper.shape[0]
    if r <= _ONE_THREAD:
        eye = jnp.eye(r, dtype=upper.dtype)
        return lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)
    half = r // 2
    first = _inverse_upper(upper[:half, :half])
    second = _inverse_upper(upper[half:, half:])
    corner = -first @ (upper[:half, half:] @ second)
    return jnp.block([[first, corner], [jnp.zeros((r - half, half), upper.dtype), second]])


@functools.partial(jax.jit, static_argnames=("n", "m", "dtype"), inline=True)
def orthogonal(key: Key[Array, ""], n: int, m: int, dtype: DTypeLike) -> Float[Array, "n m"]:
    """Return a uniform draw of n × m orthonormal columns (rows if n < m), that of jax.random.

    Args:
        key: PRNG key.
        n: rows.
        m: columns.
        dtype: float32 or float64.
    """
    q, r = qr(jax.random.normal(key, (max(n, m), min(n, m)), dtype))
    q = q * jnp.sign(jnp.diagonal(r))
    return q.T if n < m else q
