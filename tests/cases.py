"""Matrices, starts and helpers, listed once and used by every test."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from jax.tree_util import Partial

import nyscaled as nys

# One set of shapes for most tests, so that compiled functions are shared.
M, N, R = 60, 40, 4
SPECTRUM = (1.0, 0.8, 0.5, 0.2)
KEY = jax.random.key(0)


def operator(a):
    """A as an operator that knows only its products."""
    return nys.linalg.Operator(
        Partial(jnp.matmul, a), Partial(jnp.matmul, a.T), shape=a.shape, dtype=a.dtype
    )


FORMS = {"dense": lambda a: a, "bcoo": BCOO.fromdense, "operator": operator}


def one_each(names, kinds):
    """Pairs of name and kind as cases of a contract; all but the first of each name are long."""
    return [
        pytest.param(name, kind, marks=[pytest.mark.long] if i else [])
        for name in names
        for i, kind in enumerate(kinds[name])
    ]


def psd(seed=0, spectrum=SPECTRUM, m=M):
    """A (m, m) PSD and its eigenvectors."""
    return nys.spectra.psd(jax.random.key(seed), m, spectrum)


def rectangular(seed=0, spectrum=SPECTRUM):
    """A (M, N), its left and its right singular vectors."""
    return nys.spectra.rectangular(jax.random.key(seed), M, N, spectrum)


def normal(seed, shape, dtype=None):
    """A Gaussian array."""
    return jax.random.normal(jax.random.key(seed), shape, dtype or jnp.result_type(float))


def conditioned(seed, m, r, kappa, dtype=np.float64):
    """X (m, r) with singular values from 1 down to 1/kappa and generic singular vectors (NumPy)."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((m, r)))
    right, _ = np.linalg.qr(rng.standard_normal((r, r)))
    return ((left * np.geomspace(1, 1 / kappa, r)) @ right.T).astype(dtype)


def exact_residual(x, a, y=None):
    """‖XYᵀ − A‖_F in float64, whatever the precision of X and A."""
    x, a = np.asarray(x, np.float64), np.asarray(a, np.float64)
    y = x if y is None else np.asarray(y, np.float64)
    return float(np.linalg.norm(x @ y.T - a))


def run_pytest(folder, marks, **environment):
    """Run the tests of a folder that the marks select in a process of their own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
    ]
    done = subprocess.run(
        [*command, "-m", marks, str(Path(__file__).parent / folder)],
        env=inherited | environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    none = done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and marks == "long"
    assert none or (done.returncode == 0 and " passed" in done.stdout), done.stdout + done.stderr


def skip_without_float16(dtype):
    """Skips a case of float16 on processors for which XLA cannot convert it."""
    if dtype == jnp.float16:
        try:
            jnp.zeros(2).astype(dtype).block_until_ready()
        except jax.errors.JaxRuntimeError:
            pytest.skip("XLA has no float16 for this processor")
