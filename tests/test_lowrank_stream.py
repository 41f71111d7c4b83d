"""Matrices that are read by row blocks: products, files, changes between passes."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from stream_cases import BLOCK, K, M, N, matrix, thin

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


# Bad input.


def test_a_file_that_is_cut_short(tmp_path):
    a = RowBlocks(memory_map(matrix(), tmp_path), block_bytes=BLOCK)
    path = tmp_path / "a.npy"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(
        ValueError, match=f"a.npy is cut short: it has {size - 100} bytes; expected {size}"
    ):
        a.times(thin(N))


@pytest.mark.parametrize("form", [columns_of_a_map, by_columns])
def test_a_cut_file_that_is_read_through_its_map(form, tmp_path):
    """Without the check the system would end the process."""
    stored = form(matrix(), tmp_path)
    with open(tmp_path / "a.npy", "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"a\.npy is cut short: it has 200 bytes"):
        RowBlocks(stored).times(thin(N))


def test_an_hdf5_file_that_is_cut_short(tmp_path):
    """Without the check HDF5 reads zeros."""
    a = RowBlocks(hdf5(matrix(), tmp_path))
    with open(tmp_path / "a.h5", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"a\.h5 is cut short: it has 2000 bytes; expected"):
        a.times(thin(N))


def test_a_zarr_chunk_that_is_cut_short(tmp_path):
    a = RowBlocks(zarr_array(matrix(), tmp_path), block_bytes=BLOCK)
    with open(tmp_path / "a.zarr" / "c" / "1" / "0", "r+b") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match="rows 7 … 14 of a Array: "):
        a.times(thin(N))


@pytest.mark.parametrize("change", ["an entry", "order of rows", "order of columns", "zeros"])
def test_a_stream_that_changes_between_passes(change):
    dense = matrix()
    a = RowBlocks(dense, block_bytes=BLOCK)
    a.times(thin(N))
    if change == "an entry":
        dense[20, 2] = np.nextafter(dense[20, 2], 9)
    elif change == "order of rows":
        dense[[20, 21]] = dense[[21, 20]]
    elif change == "order of columns":
        dense[16:24] = dense[16:24, ::-1]
    else:
        dense[16:24] = 0
    with pytest.raises(ValueError, match="rows 16 … 24 of a ndarray changed between two passes"):
        a.adjoint_times(thin(M))


def test_a_stream_of_other_blocks_in_the_second_pass():
    heights = iter([10, 5])

    def blocks():
        return iter(np.split(matrix(), next(heights)))

    a = RowBlocks(blocks, shape=(M, N), dtype=np.float32)
    a.times(thin(N))
    with pytest.raises(ValueError, match="changed between two passes"):
        a.times(thin(N))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([matrix()[:40]], "ended after 40 rows; expected 50"),
        ([matrix(), matrix()], "has more than 50 rows"),
        (
            [matrix()[:, :4]],
            r"rows 0 … of .* have shape \(50, 4\) .*; expected numbers \(rows, 6\)",
        ),
        ([matrix()[:20], 3.0], "rows 20 … of .* have shape .* and dtype float64; expected"),
        ([matrix()[0]], "rows 0 … of .* have shape"),
        ([np.full((M, N), "a")], "have shape .* and dtype <U1; expected numbers"),
        ([np.full((M, N), np.nan, np.float32)], "rows 0 … 50 of .* have NaN or Inf entries"),
        ([matrix(), np.full((1, N), np.inf, np.float32)], "has more than 50 rows"),
    ],
)
def test_blocks_that_are_wrong(blocks, message):
    a = RowBlocks(lambda: iter(blocks), shape=(M, N), dtype=np.float32)
    for product, x in ((a.times, thin(N)), (a.adjoint_times, thin(M)), (a.times_both, thin(N))):
        with pytest.raises(ValueError, match=message):
            product(x)


@pytest.mark.parametrize("columns", [0, -1, 99])
def test_columns_that_are_not_there(columns):
    with pytest.raises(ValueError, match=f"columns is {columns}; expected"):
        RowBlocks(matrix(), block_bytes=BLOCK).times_both(thin(N), columns)


FACTORIES = {
    "returns None": (lambda: None, "gives no row blocks .*NoneType.*; expected an iterable"),
    "has an argument": (lambda rows: iter([rows]), "gives no row blocks .*missing 1 required"),
    "raises": (lambda: {}["x"], "gives no row blocks .KeyError"),
    "raises later": (lambda: (matrix()[: 20 // (2 - i)] for i in range(3)), "block 2 of .* failed"),
    "is a class": (object, "gives no row blocks"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_functions_that_give_no_blocks(name):
    factory, message = FACTORIES[name]
    a = RowBlocks(factory, shape=(M, N), dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        a.times(thin(N))


def test_an_interrupt_is_not_an_error_of_the_function():
    def blocks():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RowBlocks(blocks, shape=(M, N), dtype=np.float32).times(thin(N))


def test_products_that_overflow():
    with pytest.raises(ValueError, match="have NaN or Inf entries, or their products overflow"):
        RowBlocks(1e200 * matrix(np.float64)).times_both(thin(N))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowBlocks([[1.0]]), "the source is a list; expected an array"),
        (lambda: RowBlocks(matrix), "shape or dtype is None; expected both"),
        (lambda: RowBlocks(np.ones(3)), r"has shape \(3,\); expected a matrix"),
        (lambda: RowBlocks(np.ones((3, 2), int)), r"RowBlocks\(…, dtype=np.float32\) converts"),
        (lambda: RowBlocks(matrix(), dtype=int), "the dtype of blocks has dtype int32"),
        (lambda: RowBlocks(matrix(np.complex64), dtype=np.float32), "expected a complex one"),
        (
            lambda: RowBlocks(matrix(), shape=(M, N + 1)),
            r"shape is \(50, 7\) for .*; expected None",
        ),
        (lambda: RowBlocks(matrix, shape=(M, N), dtype="foo"), "dtype is 'foo'; expected a dtype"),
        (lambda: RowBlocks(matrix(), dtype="foo"), "dtype is 'foo'; expected a dtype"),
        (lambda: RowBlocks(matrix(), block_bytes=0), "block_bytes is 0; expected"),
        (lambda: RowBlocks(matrix()).times(thin(M)), r"shape \(50, 3\) .*; expected \(6, k\)"),
    ],
)
def test_what_is_no_stream(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Resuming.


def test_a_memory_map_is_factorized_where_it_lies(tmp_path):
    dense = matrix()
    f = nys.factorize(memory_map(dense, tmp_path), rank=N - 1)
    approximation = (f.left * f.singular_values) @ f.right.T
    smallest = np.linalg.svd(dense)[1][-1]
    assert np.linalg.norm(approximation - dense) <= 1.01 * smallest
    assert int(f.passes) < 6
