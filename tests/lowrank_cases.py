"""Matrices with known singular values, and measures of a factorization against the SVD."""

import jax.numpy as jnp
import numpy as np

SPECTRA = {
    "harmonic": lambda n: 1 / np.arange(1.0, n + 1),
    "fast": lambda n: 0.5 ** np.arange(n),
    "flat": lambda n: np.linspace(1.0, 0.8, n),
    "gap": lambda n: np.where(np.arange(n) < 10, 1.0, 1e-3),
    "noise": lambda n: np.where(np.arange(n) < 5, 1.0, 0.05 * np.linspace(1, 0.5, n)),
    "square root": lambda n: np.arange(1.0, n + 1) ** -0.5,
}


def matrix(m, n, singular_values, dtype=np.float32, seed=0):
    """A matrix with these singular values and random vectors."""
    rng, k = np.random.default_rng(seed), min(m, n)

    def frame(rows):
        x = rng.standard_normal((rows, k))
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.standard_normal((rows, k))
        return np.linalg.qr(x)[0]

    return ((frame(m) * singular_values) @ frame(n).conj().T).astype(dtype)


def product(f):
    """L diag(s) Rᴴ in double precision."""
    left, s, right = (np.asarray(x).astype(np.complex128) for x in parts(f))
    return (left * s) @ right.conj().T


def parts(f):
    return f.left, f.singular_values, f.right


def error(a, f):
    return np.linalg.norm(np.asarray(a) - product(f))


def best(singular_values, rank):
    return np.linalg.norm(singular_values[rank:])


def orthonormality(x):
    return float(jnp.max(jnp.abs(x.conj().T @ x - jnp.eye(x.shape[1]))))
