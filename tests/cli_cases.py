"""Matrices in files, and calls of `nyscaled factorize`."""

import json

import h5py
import numpy as np
import safetensors.numpy
import scipy.io
import scipy.sparse

from nyscaled.cli import main

M, N, RANK = 30, 20, 3


def matrix():
    """A matrix of rank 3."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(M, RANK)) @ rng.normal(size=(RANK, N))).astype(np.float32)


def saved(path, a):
    """`path`, written with the matrix in the format of its name."""
    if path.suffix == ".npy":
        np.save(path, a)
    elif path.suffix == ".npz":
        np.savez(path, a=a, vector=a[0], counts=np.ones((2, 2), int))
    elif path.suffix == ".safetensors":
        tensors = {"h.0.a.weight": a, "h.0.a.bias": a[0], "ids": np.ones((2, 2), int)}
        safetensors.numpy.save_file(tensors, path)
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            file["group/a"], file["group/vector"] = a, a[0]
    else:
        scipy.io.mmwrite(path, scipy.sparse.coo_array(a) if "sparse" in path.name else a)
    return path


def folder_of(path, tensors):
    """A folder of a model with these tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def factorize(*words):
    return main(["factorize", *map(str, words)])


def product(arrays, prefix=""):
    left, values, right = (arrays[prefix + k] for k in ("left", "singular_values", "right"))
    return left * values @ right.T


def refused(capsys, *words):
    """The one line of reason with which a command line fails."""
    status = factorize(*words)
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert error.startswith("nyscaled factorize: error: ")
    assert error.count("\n") == 1
    return error
