"""Matrices that are read by row blocks: products, files, changes between passes."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from stream_cases import (
    BLOCK,
    STORED,
    K,
    M,
    N,
    by_columns,
    hdf5,
    matrix,
    memory_map,
    rows_of_a_map,
    thin,
)

import nyscaled as nys
from nyscaled.lowrank import RowBlocks
from nyscaled.lowrank.host import HostMatrix, as_input


def assert_close(got, expected):
    assert np.max(np.abs(got - expected)) <= 1e-5 * np.max(np.abs(expected))


def assert_products(a, dense):
    x, y = thin(N, dense.dtype), thin(M, dense.dtype)
    assert (a.shape, a.dtype) == (dense.shape, dense.dtype)
    image, coimage = a.times(x), a.adjoint_times(y)
    assert image.dtype == coimage.dtype == dense.dtype
    assert_close(image, dense @ x)
    assert_close(coimage, dense.conj().T @ y)
    image, both = a.times_both(x)
    assert_close(image, dense @ x)
    assert_close(both, dense.conj().T @ (dense @ x))
    assert a.passes == 3


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
@pytest.mark.parametrize("form", STORED)
def test_products_of_what_is_stored(form, dtype, tmp_path):
    dense = matrix(dtype)
    stored = STORED[form](dense, tmp_path)
    assert_products(RowBlocks(stored, block_bytes=BLOCK), dense)
    assert isinstance(as_input("A", stored), RowBlocks)


def test_products_of_arrays_and_functions():
    dense = matrix()
    assert_products(RowBlocks(dense, block_bytes=BLOCK), dense)
    parts = (0, 1, 20, 20, 49, M)  # one of them without rows
    pairs = list(itertools.pairwise(parts))
    blocks = RowBlocks(lambda: (dense[i:j] for i, j in pairs), shape=dense.shape, dtype=dense.dtype)
    assert_products(blocks, dense)
    assert isinstance(blocks, HostMatrix)


@pytest.mark.parametrize("block_bytes", [1, BLOCK, 10**9])
def test_the_height_of_blocks_does_not_matter(block_bytes):
    assert_products(RowBlocks(matrix(), block_bytes=block_bytes), matrix())


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64, ">f4"])
def test_entries_are_converted_as_they_are_read(dtype, tmp_path):
    stored = memory_map((8 * np.abs(matrix())).astype(dtype), tmp_path)
    a = RowBlocks(stored, dtype=np.float32, block_bytes=BLOCK)
    assert_products(a, np.array(stored, np.float32))


@pytest.mark.parametrize("form", [memory_map, rows_of_a_map, by_columns, hdf5])
@pytest.mark.parametrize("dtype", [">f4", ">c8"])
def test_the_other_byte_order_is_read_too(form, dtype, tmp_path):
    dense = matrix(np.dtype(dtype).type)
    stored = form(dense.astype(dtype), tmp_path)
    assert not stored.dtype.isnative
    assert_products(RowBlocks(stored, block_bytes=BLOCK), dense)
    assert as_input("A", stored).dtype == dense.dtype


@pytest.mark.parametrize("dtype", [">f2", ">f8"])
def test_the_other_byte_order_of_half_and_double(dtype, tmp_path):
    stored = memory_map(matrix().astype(dtype), tmp_path)
    a = RowBlocks(stored)
    assert a.dtype == np.float32  # x64 is off
    np.testing.assert_array_equal(np.concatenate(list(a.blocks())), stored.astype(np.float32))


def test_sparse_matrices_become_dense_by_blocks():
    dense = np.where(matrix() > 0, matrix(), 0)
    for form in ("csr", "csc", "coo", "dok"):
        stored = scipy.sparse.coo_array(dense).asformat(form)
        assert_products(RowBlocks(stored, block_bytes=BLOCK), dense)
    blocks = RowBlocks(
        lambda: (scipy.sparse.csr_array(dense[i : i + 7]) for i in range(0, M, 7)),
        shape=dense.shape,
        dtype=dense.dtype,
    )
    assert_products(blocks, dense)


def test_half_precision_is_multiplied_in_single(tmp_path):
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert RowBlocks(matrix().astype(dtype)).dtype == np.float32


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1e20, 1e36])
def test_squares_that_single_precision_does_not_hold(scale):
    dense = np.float32(scale) * matrix()
    _, both = RowBlocks(dense, block_bytes=BLOCK).times_both(thin(N))
    wide = dense.astype(np.float64)
    assert_close(both / scale**2, wide.T @ (wide @ thin(N)) / scale**2)


def test_blocks_are_read_once_and_ahead():
    reads = []

    class Counted:
        shape, dtype = (M, N), np.dtype(np.float32)

        def __getitem__(self, rows):
            reads.append(rows.start)
            return matrix()[rows]

    a = RowBlocks(Counted(), block_bytes=BLOCK)
    a.times_both(thin(N))
    assert reads == list(range(0, M, 8))


@pytest.mark.parametrize("form", ["function", "class"])
def test_a_buffer_may_be_used_for_all_blocks(form):
    """As readers do that allocate once; its address is one that needs no copy."""
    a, address = matrix(), np.empty(8 * N * 4 + 64, np.uint8)
    start = -address.ctypes.data % 64
    buffer = address[start : start + 8 * N * 4].view(np.float32).reshape(8, N)

    class Rows:
        shape, dtype = a.shape, a.dtype

        def __getitem__(self, rows):
            part = buffer[: len(a[rows])]
            part[...] = a[rows]
            return part

    def blocks():
        return (Rows()[i : i + 8] for i in range(0, M, 8))

    source = RowBlocks(Rows(), block_bytes=BLOCK)
    if form == "function":
        source = RowBlocks(blocks, shape=a.shape, dtype=a.dtype)
        np.testing.assert_allclose(
            nys.lowrank.one_pass(blocks(), K).singular_values,
            nys.lowrank.one_pass(a, K).singular_values,
            rtol=1e-5,
        )
    np.testing.assert_array_equal(source.times(np.eye(N, dtype="f")), a)
    assert_close(source.adjoint_times(thin(M)), a.T @ thin(M))


def test_a_bar_is_drawn(capsys):
    pytest.importorskip("tqdm")
    RowBlocks(matrix(), block_bytes=BLOCK, progress=True).times(thin(N))
    drawn = capsys.readouterr().err
    assert "pass 1: A x" in drawn
    assert "50/50" in drawn


MEMORY = """
import sys
import numpy as np
from nyscaled.lowrank import RowBlocks

m, n, k = 50_000, 1_000, 8


class Virtual:
    shape, dtype = (m, n), np.dtype(np.float32)

    def __getitem__(self, rows):
        i = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
        return i / m + np.zeros((1, n), np.float32)


def memory(name):
    status = open("/proc/self/status").read()
    return int(status.split(name + ":")[1].split()[0]) / 1024


def passes(a):
    right = np.linalg.qr(a.times_both(np.ones((n, k), np.float32))[1])[0].astype(np.float32)
    left = np.linalg.qr(a.times(right))[0]
    a.adjoint_times(left)


open(sys.argv[1], "wb").truncate(m * n * 4)
stored = np.memmap(sys.argv[1], np.float32, "r", shape=(m, n))
passes(RowBlocks(Virtual(), block_bytes=2**22))
before = memory("VmRSS")
for source in (Virtual(), stored):
    passes(RowBlocks(source, block_bytes=2**22))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.long
def test_memory_holds_blocks_and_thin_matrices(tmp_path):
    """Three passes over 200 MB, made and mapped, by blocks of 4 MB. Programs take memory too."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a.bin")], capture_output=True, text=True
    )
    assert float(result.stdout) < 120, result.stderr


def test_a_memory_map_is_factorized_where_it_lies(tmp_path):
    dense = matrix()
    f = nys.factorize(memory_map(dense, tmp_path), rank=N - 1)
    approximation = (f.left * f.singular_values) @ f.right.T
    smallest = np.linalg.svd(dense)[1][-1]
    assert np.linalg.norm(approximation - dense) <= 1.01 * smallest
    assert int(f.passes) < 6
