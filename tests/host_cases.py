"""Small matrices of the host, dense and sparse."""

import jax.numpy as jnp
import numpy as np

from nyscaled.lowrank import HostOperator
from nyscaled.lowrank.host import HostMatrix
from nyscaled.matrices import transpose_times

M, N, K = 7, 5, 3


def matrix(dtype=np.float32):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((M, N)) * (rng.random((M, N)) < 0.6)
    if np.issubdtype(dtype, np.complexfloating):
        a = a * np.exp(2j * np.pi * rng.random((M, N)))
    return a.astype(dtype)


def thin(rows, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, K, 2)).astype(np.float32).view(np.complex64)[..., 0]
    return (x if np.issubdtype(dtype, np.complexfloating) else x.real).astype(dtype)


def operator(times=None, adjoint_times=None, dense=None, dtype=np.float32):
    dense = matrix(dtype) if dense is None else dense
    return HostOperator(
        times or (lambda x: dense @ x),
        adjoint_times or (lambda y: dense.conj().T @ y),
        shape=(M, N),
        dtype=dtype,
    )


def both(a, dtype=np.float32):
    """A x and Aᴴ y of what `as_input` returns."""
    x, y = thin(N, dtype), thin(M, dtype)
    if isinstance(a, HostMatrix):
        return a.times(x), a.adjoint_times(y)
    return a @ jnp.asarray(x), transpose_times(a, jnp.asarray(y).conj()).conj()


def assert_products(a, dense):
    dtype = np.complex64 if np.iscomplexobj(dense) else np.float32
    image, coimage = both(a, dtype)
    for got, expected in (
        (image, dense @ thin(N, dtype)),
        (coimage, dense.conj().T @ thin(M, dtype)),
    ):
        assert np.max(np.abs(got - expected)) <= 1e-5 * np.max(np.abs(expected))
