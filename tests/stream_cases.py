"""A small matrix that is read by row blocks, and how it is stored."""

import numpy as np
import pytest

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


def memory_map(dense, folder):
    np.save(folder / "a.npy", dense)
    return np.load(folder / "a.npy", mmap_mode="r")


def rows_of_a_map(dense, folder):
    """Rows of a map that begins somewhere in a file: a view knows a wrong offset."""
    padded = np.concatenate([dense[:3], dense, dense[:5]]).astype(dense.dtype)
    (folder / "a.bin").write_bytes(b"x" * 12 + padded.tobytes())
    kind = {"dtype": dense.dtype, "shape": padded.shape, "offset": 12, "mode": "r"}
    return np.memmap(folder / "a.bin", **kind)[3 : 3 + M]


def columns_of_a_map(dense, folder):
    return memory_map(np.concatenate([dense, dense], axis=1), folder)[:, :N]


def by_columns(dense, folder):
    return memory_map(np.asfortranarray(dense), folder)


def hdf5(dense, folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("a", data=dense, chunks=(3, 2))
    return h5py.File(folder / "a.h5")["a"]


def zarr_array(dense, folder):
    zarr = pytest.importorskip("zarr")
    a = zarr.create_array(folder / "a.zarr", shape=dense.shape, dtype=dense.dtype, chunks=(7, 2))
    a[:] = dense
    return a


STORED = {
    "memory map": memory_map,
    "rows of a map": rows_of_a_map,
    "columns of a map": columns_of_a_map,
    "by columns": by_columns,
    "hdf5": hdf5,
    "zarr": zarr_array,
}
