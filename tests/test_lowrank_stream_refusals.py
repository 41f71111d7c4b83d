"""What streams refuse: files that are cut short, blocks that change, and what gives no blocks."""

import numpy as np
import pytest
from stream_cases import (
    BLOCK,
    M,
    N,
    by_columns,
    columns_of_a_map,
    hdf5,
    matrix,
    memory_map,
    thin,
    zarr_array,
)

from nyscaled.lowrank import RowBlocks


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
        dense[16:24] = np.roll(dense[16:24], 2, axis=1)  # words of eight bytes stay whole
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
