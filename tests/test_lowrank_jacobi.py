"""The small factorizations of `nys.factorize`: right to rounding, with LAPACK on small pieces."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lapack import CALL

import nyscaled as nys
from nyscaled.lapack import eigh
from nyscaled.lowrank.core_svd import core_svd
from nyscaled.lowrank.jacobi import eigh_of_positive, jacobi

N = 70  # padded to 72
SPECTRA = {
    "harmonic": 1 / np.arange(1, N + 1),
    "graded": np.geomspace(1, 1e-12, N),
    "clustered": np.r_[1 + 1e-6 * np.arange(35), 1e-3 + 1e-9 * np.arange(35)],
    "repeated": np.repeat([1.0, 0.5, 0.5, 0.1, 0.1], 14),
    "flat": np.linspace(1, 0.2, N),
    "identity": np.ones(N),
    "deficient": np.r_[1 / np.arange(1, 21), np.zeros(N - 20)],
    "zero": np.zeros(N),
}


def orthogonal(seed, dtype):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, N))
    if dtype == "complex64":
        x = x + 1j * rng.standard_normal((N, N))
    return np.linalg.qr(x)[0]


def positive(spectrum, dtype="float32"):
    q = orthogonal(0, dtype)
    return ((q * spectrum) @ q.conj().T).astype(dtype)


def errors(a, values, vectors):
    """‖AV − VΛ‖, ‖VᴴV − I‖ and the error of the eigenvalues, in spectral norms over that of A."""
    a, vectors = a.astype(complex), np.asarray(vectors, complex)
    expected = np.linalg.eigvalsh(a)
    size = max(expected[-1], np.finfo(np.float32).tiny)
    return (
        np.linalg.norm(a @ vectors - vectors * np.asarray(values), 2) / size,
        np.linalg.norm(vectors.conj().T @ vectors - np.eye(N), 2),
        np.abs(values - expected).max() / size,
    )


def test_derivatives_are_those_of_lapack():
    a = jnp.asarray(positive(SPECTRA["flat"]))
    change = jnp.asarray(np.random.default_rng(1).standard_normal((N, N)), jnp.float32)

    def leading(decomposition):
        def values_and_projector(a):
            values, vectors = decomposition(a)
            return values, jnp.outer(vectors[:, -1], vectors[:, -1])

        return jax.jvp(values_and_projector, (a,), (change,))[1]

    for got, expected in zip(leading(jacobi), leading(eigh), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_all_spectra_are_right_to_rounding(dtype):
    eps = np.finfo(np.float32).eps
    for name, spectrum in SPECTRA.items():
        a = positive(spectrum, dtype)
        values, vectors = jacobi(jnp.asarray(a))
        assert np.all(np.diff(values) >= 0), name
        assert max(errors(a, values, vectors)) < 2 * N * eps, name


def test_a_batch_is_a_loop_and_scales_pass_through():
    stack = jnp.stack([jnp.asarray(positive(SPECTRA[name])) for name in ("harmonic", "zero")])
    values, vectors = jax.vmap(eigh_of_positive)(stack)
    for a, w, v in zip(stack, values, vectors, strict=True):
        alone, turn = jacobi(a)
        np.testing.assert_allclose(w, alone, atol=1e-6)
        np.testing.assert_allclose((v * w) @ v.T, (turn * alone) @ turn.T, atol=1e-5)
    for scale in (2.0**100, 2.0**-100):
        np.testing.assert_allclose(jacobi(stack[0] * scale)[0] / scale, values[0], atol=1e-6)
    assert np.isnan(jacobi(stack[0].at[3, 4].set(jnp.nan))[0]).any()


def test_the_svd_of_a_core_keeps_small_singular_values():
    eps = np.finfo(np.float32).eps
    for name, spectrum in SPECTRA.items():
        c = positive(spectrum) @ orthogonal(1, "float32").astype(np.float32)
        u, s, vh = (np.asarray(x, np.float64) for x in core_svd(jnp.asarray(c)))
        assert np.linalg.norm((u * s) @ vh - c, 2) <= 4 * N * eps * s[0], name
        exact = np.linalg.svd(c.astype(np.float64), compute_uv=False)
        assert np.abs(s - exact).max() <= N * eps * s[0], name
        live = u[:, s > 100 * N**0.5 * eps * s[0]]
        assert np.linalg.norm(live.T @ live - np.eye(live.shape[1]), 2) < 10 * N * eps, name


def lapack_sides(fn, platform, side=96):
    """Names of LAPACK's and other libraries' calls, and the largest sides of their matrices."""
    x = jax.ShapeDtypeStruct((side, side), jnp.float32)
    text = jax.jit(fn).trace(x).lower(lowering_platforms=(platform,)).as_text()
    return {
        name: max(
            int(d) for shape in re.findall(r"tensor<(.*?)xf32>", sizes) for d in shape.split("x")
        )
        for name, sizes in CALL.findall(text)
    }


def test_lapack_sees_small_matrices_on_cpus_and_other_platforms_have_their_own():
    assert lapack_sides(core_svd, "cpu") == {"lapack_ssyevd_ffi": 48}
    # 64 columns wake threads on some processors.
    assert max(lapack_sides(core_svd, "cpu", n)["lapack_ssyevd_ffi"] for n in (64, 126, 192)) < 64
    factorize = functools.partial(nys.factorize, rank=20, key=jax.random.key(0))
    assert lapack_sides(factorize, "cpu", 300)["lapack_ssyevd_ffi"] < 64
    tpu = jax.jit(eigh_of_positive).trace(jax.ShapeDtypeStruct((96, 96), jnp.float32))
    assert "lapack" not in tpu.lower(lowering_platforms=("tpu",)).as_text()
