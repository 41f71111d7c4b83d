"""What `nys.factorize` refuses: arguments and matrices."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
from lowrank_cases import SPECTRA, matrix

import nyscaled as nys


@pytest.fixture(scope="module")
def a():
    return matrix(120, 90, SPECTRA["harmonic"](90))


BAD = {
    "no rank": ({}, "rank is None and tol is None; expected exactly one"),
    "both": ({"rank": 3, "tol": 0.1}, "expected exactly one"),
    "rank 0": ({"rank": 0}, "rank is 0; expected 1 ≤ rank ≤ 90"),
    "large rank": ({"rank": 91}, "rank is 91"),
    "tol 0": ({"tol": 0.0}, "tol is 0; expected a number in"),
    "negative tol": ({"tol": -1.0}, "tol is -1"),
    "tol True": ({"tol": True}, r"tol is True; expected a number in \(0, 1\]"),
    "large tol": ({"tol": 2.0}, "tol is 2"),
    "one pass": ({"rank": 3, "passes": 1}, "passes is 1; expected an integer ≥ 2"),
    "max_rank with rank": ({"rank": 3, "max_rank": 4}, "max_rank is 4 and rank is 3"),
    "max_rank": ({"tol": 0.1, "max_rank": 0}, "max_rank is 0"),
    "jackknife": ({"tol": 0.1, "jackknife": True}, "jackknife is True"),
    "oversampling": ({"rank": 3, "oversampling": -1}, "oversampling is -1"),
    "oversampling with tol": ({"tol": 0.1, "oversampling": 4}, "oversampling is 4 and tol is"),
    "passes with tol": ({"tol": 0.1, "passes": 3}, "passes is 3 and tol is given; expected a rank"),
    "jackknife of one column": (
        {"rank": 1, "oversampling": 0, "jackknife": True},
        "jackknife is True for 1 column",
    ),
    "jackknife of all columns": (
        {"rank": 4, "oversampling": 0, "passes": 2, "jackknife": True},
        "jackknife is True for rank 4 of 4 columns; expected a rank below 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(a, name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        nys.factorize(a, **options)


@pytest.mark.long
def test_arguments_of_another_type():
    """In a process whose calls are not checked by type, as those of users are not."""
    code = """
import jax, numpy as np, nyscaled as nys
two_keys = jax.random.split(jax.random.key(0))
for options in (
    {"tol": np.array([0.1, 0.2])}, {"tol": abs}, {"tol": "0.1"}, {"rank": 2, "key": 0},
    {"tol": np.True_}, {"tol": jax.numpy.asarray(True)}, {"tol": b"1"}, {"tol": np.array("0.1")},
    {"tol": np.complex64(0.1)}, {"rank": 2, "key": np.zeros(3, np.uint32)},
    {"rank": 2, "key": "a"}, {"rank": 2, "key": two_keys}, {"rank": np.array([1, 2])},
    {"rank": 2.5}, {"rank": "2"}, {"tol": 0.1, "max_rank": 2.5},
):
    try:
        nys.factorize(np.ones((4, 3), np.float32), **options)
    except ValueError as error:
        assert "; expected" in str(error), error
    else:
        raise AssertionError(options)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{"rank": 3}, {"tol": 0.1}])
def test_bad_matrices(a, options):
    for entry in (np.nan, np.inf):
        b = a.copy()
        b[3, 4] = entry
        with pytest.raises(ValueError, match="A has NaN or Inf entries"):
            nys.factorize(b, **options)
    with pytest.raises(ValueError, match="A has dtype int"):
        nys.factorize(np.ones((4, 4), int), **options)
    with pytest.raises(ValueError, match=r"A has shape \(4,\)"):
        nys.factorize(np.ones(4, np.float32), **options)
    with pytest.raises(ValueError, match=r"A has shape \(0, 3\); expected a matrix"):
        nys.factorize(np.ones((0, 3), np.float32), **options)


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_array, scipy.sparse.dok_array])
def test_doubles_that_single_precision_takes_as_zero_are_not_zeros(form):
    with pytest.raises(ValueError, match="where float32 loses digits"):
        nys.factorize(form(1e-60 * np.eye(9)), 3)


def test_a_tolerance_is_refused_under_jit(a):
    with pytest.raises(ValueError, match="A, tol or the key is traced; expected a rank"):
        jax.jit(lambda a: nys.factorize(a, tol=0.1).left)(a)


def test_a_tolerance_is_refused_for_a_batch_of_keys(a):
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="A, tol or the key is traced; expected a rank"):
        jax.vmap(lambda key: nys.factorize(a, tol=0.1, key=key).left)(keys)
