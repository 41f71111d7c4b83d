"""A small matrix that is read by row blocks."""

import numpy as np

M, N, K = 50, 6, 3
BLOCK = 8 * N * 4  # bytes of eight rows


def matrix(dtype=np.float32):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((M, N))
    if np.issubdtype(dtype, np.complexfloating):
        a = a * np.exp(2j * np.pi * rng.random((M, N)))
    return a.astype(dtype)


def thin(rows, dtype=np.float32):
    return np.random.default_rng(rows).standard_normal((rows, K)).astype(dtype)
