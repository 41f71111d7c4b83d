"""What `nyscaled factorize` makes of each dtype and byte order that a file can hold."""

import h5py
import numpy as np
import pytest

from nyscaled import lowrank
from nyscaled.cli import inputs

RNG = np.random.default_rng(0)
A = np.round(8 * RNG.normal(size=(6, 4)))
C = A + 1j * np.round(8 * RNG.normal(size=(6, 4)))

BECOMES = {
    "?": np.float32,
    "u1": np.float32,
    "<i4": np.float32,
    ">i8": np.float32,
    "<f2": np.float32,
    ">f2": np.float32,
    "<f4": np.float32,
    ">f4": np.float32,
    "<f8": np.float64,
    ">f8": np.float64,
    "g": np.float64,
    "<c8": np.complex64,
    ">c8": np.complex64,
    "<c16": np.complex128,
    ">c16": np.complex128,
    "G": np.complex128,
}


def values(dtype):
    dtype = np.dtype(dtype)
    return (C if dtype.kind == "c" else np.abs(A)).astype(dtype)


def written(path, a):
    if path.suffix == ".npy":
        np.save(path, a)
    elif path.suffix == ".npz":
        np.savez(path, a=a, vector=a[0])
    else:
        with h5py.File(path, "w") as file:
            file["a"] = a
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5"])
@pytest.mark.parametrize("dtype", BECOMES)
def test_numbers_of_every_dtype_are_those_of_the_file(tmp_path, name, dtype):
    a = values(dtype)
    if name != "a.npy" and a.dtype.kind in "biu":
        pytest.skip("of several arrays, those of floats are taken")
    (entry,) = inputs.entries(written(tmp_path / name, a))
    loaded = entry.load()
    assert type(loaded) is np.ndarray
    assert loaded.dtype == BECOMES[dtype]
    assert loaded.dtype.isnative
    np.testing.assert_array_equal(loaded, a)


@pytest.mark.parametrize("name", ["a.npy", "a.h5"])
@pytest.mark.parametrize("dtype", [">i8", ">f2", ">f4", ">f8", "g", ">c8", ">c16", "G"])
def test_blocks_of_every_dtype_are_those_of_the_file(tmp_path, name, dtype, monkeypatch):
    monkeypatch.setattr(inputs, "memory", lambda: 4)
    a = values(dtype)
    if name == "a.h5" and a.dtype.kind == "i":
        pytest.skip("of several arrays, those of floats are taken")
    (entry,) = inputs.entries(written(tmp_path / name, a))
    loaded = entry.load()
    assert isinstance(loaded, lowrank.RowBlocks)
    assert loaded.dtype == BECOMES[dtype]
    np.testing.assert_array_equal(np.concatenate(list(loaded.blocks())), a)


@pytest.mark.parametrize("dtype", ["U3", "M8[s]", [("x", "f4")]])
def test_what_is_no_number_is_refused(tmp_path, dtype):
    (entry,) = inputs.entries(written(tmp_path / "a.npy", np.zeros((3, 2), dtype)))
    with pytest.raises(ValueError, match=r"has dtype .*; expected numbers"):
        entry.load()
