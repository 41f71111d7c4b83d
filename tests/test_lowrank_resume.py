"""Runs over a stream that are killed or break off, and continue from their folder."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from stream_cases import BLOCK, M, N, matrix, thin

import nyscaled as nys
from nyscaled.lowrank import RowBlocks

KILLED = """
import os, signal, sys
import numpy as np
import nyscaled._files
from nyscaled.lowrank import RowBlocks

m, n = 60, 5
dense = np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)


class Rows:
    shape, dtype = dense.shape, dense.dtype

    def __init__(self, reads):
        self.reads = reads

    def __getitem__(self, rows):
        self.reads -= 1
        if self.reads == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return dense[rows]


def run(folder, reads=-1):
    source = Rows(reads)
    a = RowBlocks(source, block_bytes=10 * n * 4, resume=folder, save_seconds=0)
    image, both = a.times_both(np.ones((n, 2), np.float32))
    right = np.linalg.qr(both)[0].astype(np.float32)
    left = np.linalg.qr(a.times(right))[0]
    return image, both, left, a.adjoint_times(left), -source.reads


def killed(folder, reads, replaces):
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, iter(range(replaces, -1000, -1))

        def replace_or_die(*paths):
            if (left := next(calls)) in (0, 1) and left == replaces % 2:
                replace(*paths)
                os.kill(os.getpid(), signal.SIGKILL)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        nyscaled._files.os.replace = replace_or_die
        run(folder, reads)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (reads, replaces)


base = sys.argv[1]
moments = [(reads, -1) for reads in (2, 3, 8, 13)]
moments += [(-1, replaces) for replaces in (1, 4, 6, 13)]
for i, moment in enumerate(moments):  # before JAX has threads, which no child inherits
    killed(f"{base}/{i}", *moment)
*expected, all_reads = run(f"{base}/whole")
for i, moment in enumerate(moments):
    *resumed, reads_left = run(f"{base}/{i}")
    for x, y in zip(expected, resumed, strict=True):
        np.testing.assert_array_equal(x, y)
    print(*moment, reads_left, all_reads)
    *again, first = run(f"{base}/{i}")
    assert first == 2, first  # only the first block
"""


@pytest.mark.long
def test_a_killed_run_continues_to_the_last_bit(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    left = [int(line.split()[2]) for line in result.stdout.splitlines()]
    assert left[0] > left[2] > left[3], result.stdout  # what was done is not done again


def begun(folder, dense=None, x=None):
    """A run that stopped after its first pass."""
    dense = matrix() if dense is None else dense
    a = RowBlocks(dense, block_bytes=BLOCK, resume=folder, save_seconds=0)
    return a, a.times_both(thin(N) if x is None else x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dense": 2 * matrix()}, "checksum of the first block is .* there and .* here"),
        ({"dense": matrix()[:40]}, r"shape is \(50, 6\) there and \(40, 6\) here"),
        ({"dense": matrix(np.complex64)}, "dtype is float32 there and complex64 here"),
        ({"x": thin(N)[:, :2]}, r"argument is \(6, 3\) float32 there and \(6, 2\) float32 here"),
        ({"x": -thin(N)}, "digest of its entries is .* there and .* here"),
    ],
)
def test_a_folder_of_another_run(kwargs, message, tmp_path):
    begun(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} belongs to another run: .*{message}"):
        begun(tmp_path, **kwargs)


class Broken:
    """A matrix that cannot be read for a while."""

    def __init__(self, a, reads):
        self.a, self.shape, self.dtype, self.reads = a, a.shape, a.dtype, reads

    def __getitem__(self, rows):
        self.reads -= 1
        if not self.reads:
            raise OSError("the disk is away")
        return self.a[rows]


@pytest.mark.parametrize("reads", [2, 5, 10, 18])
@pytest.mark.long
def test_a_factorization_that_broke_off_ends_with_the_same_factors(reads, tmp_path):
    a = np.random.default_rng(0).standard_normal((M, 40)).astype(np.float32)
    settings = {"rank": 2, "passes": 3}
    kwargs = {"block_bytes": 8 * 40 * 4, "resume": tmp_path, "save_seconds": 0}
    whole = nys.factorize(RowBlocks(a, block_bytes=8 * 40 * 4), **settings)
    with pytest.raises(ValueError, match="the disk is away"):
        nys.factorize(RowBlocks(Broken(a, reads), **kwargs), **settings)
    resumed = nys.factorize(RowBlocks(a, **kwargs), **settings)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    for change, message in (
        ({"rank": 5}, r"argument is \(40, \d+\) float32 there and \(40, \d+\) float32 here"),
        ({"key": jax.random.key(1)}, "digest of its entries is"),
    ):
        with pytest.raises(ValueError, match=message):
            nys.factorize(RowBlocks(a, **kwargs), **{**settings, **change})


def test_another_product_than_in_the_folder(tmp_path):
    begun(tmp_path)
    a = RowBlocks(matrix(), block_bytes=BLOCK, resume=tmp_path)
    with pytest.raises(ValueError, match="product is A x and Aᴴ A x there and A x here"):
        a.times(thin(N))


def test_blocks_of_another_height_in_the_folder(tmp_path):
    begun(tmp_path)
    a = RowBlocks(matrix(), block_bytes=2 * BLOCK, resume=tmp_path)
    with pytest.raises(ValueError, match="first block"):
        a.times_both(thin(N))


def test_rows_that_changed_while_the_run_was_down(tmp_path):
    dense = matrix()
    begun(tmp_path, dense)
    dense[30] = 0
    a, _ = begun(tmp_path, dense)
    with pytest.raises(ValueError, match=r"rows 24 … 32 of .* changed between two passes"):
        a.times(thin(N))


@pytest.mark.parametrize("content", [b"", b"PK", b"text", "pickle", "cut"])
def test_a_broken_file_of_a_run(content, tmp_path):
    begun(tmp_path)
    path = tmp_path / "pass-000.npz"
    if content == "pickle":
        np.savez(path, description=np.array([print], dtype=object))
    else:
        path.write_bytes(path.read_bytes()[:-30] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"pass-000\.npz is not a sound file of a run"):
        begun(tmp_path)


# Files in place of that of the first pass, of other kinds than it is.


def npy(path):
    path.with_suffix("").mkdir()
    np.save(path.with_suffix("") / "a", matrix())
    path.write_bytes((path.with_suffix("") / "a.npy").read_bytes())


def folder(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def other_arrays(path):
    np.savez(path, a=matrix())


def a_list(path):
    changed(path, description="[1]")


def a_number(path):
    changed(path, description="1")


def no_json(path):
    changed(path, description="{")


def deep_json(path):
    changed(path, description="[" * 100_000)


def row_of_another_shape(path):
    changed(path, row=[1, 2])


def row_beyond_the_matrix(path):
    changed(path, row=M + 1)


def row_below_zero(path):
    changed(path, row=-1)


def checksums_of_another_shape(path):
    changed(path, checksums=[1, 2])


def image_of_another_shape(path):
    changed(path, image=matrix()[:5])


def image_of_another_dtype(path):
    changed(path, image=np.zeros((M, 3), int))


def no_sums(path):
    changed(path, sums=None)


def encrypted(path):
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + place] |= 1
    path.write_bytes(data)


def compressed_by_another_method(path):
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(signature) + place] = 77
    path.write_bytes(data)


OTHER_KINDS = (
    npy,
    folder,
    pipe,
    other_arrays,
    a_list,
    a_number,
    no_json,
    deep_json,
    row_of_another_shape,
    row_beyond_the_matrix,
    row_below_zero,
    checksums_of_another_shape,
    image_of_another_shape,
    image_of_another_dtype,
    no_sums,
    encrypted,
    compressed_by_another_method,
)


def changed(path, **arrays):
    """Replace arrays of the file."""
    with np.load(path) as file:
        arrays = {**file, **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("write", OTHER_KINDS)
def test_a_file_of_a_run_of_another_kind(write, tmp_path):
    begun(tmp_path)
    path = tmp_path / "pass-000.npz"
    write(path)
    with pytest.raises(ValueError, match=r"pass-000\.npz is not a sound file of a run: .+; delete"):
        begun(tmp_path)


def test_bytes_that_flipped_are_seen_or_do_not_matter(tmp_path):
    _, expected = begun(tmp_path)
    path, rng, refused = tmp_path / "pass-000.npz", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= rng.integers(1, 256)
        path.write_bytes(data)
        try:
            for got, right in zip(begun(tmp_path)[1], expected, strict=True):
                np.testing.assert_array_equal(got, right)
        except ValueError as error:
            assert "is not a sound file of a run" in str(error) or "another run" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20


def stored(form, path, dense):
    if form == "memory map":
        np.save(path, dense)
        return np.load(f"{path}.npy", mmap_mode="r")
    if form == "zarr":
        a = pytest.importorskip("zarr").create_array(
            f"{path}.zarr", shape=dense.shape, dtype=dense.dtype, chunks=(7, 2), overwrite=True
        )
        a[:] = dense
        return a
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["a"] = dense
    return h5py.File(path)["a"]


@pytest.mark.parametrize("form", ["memory map", "hdf5", "zarr"])
def test_a_file_that_changed_after_its_run_had_ended(form, tmp_path):
    """In rows that no product reads again."""
    dense, folder = matrix(), tmp_path / "run"
    begun(folder, stored(form, tmp_path / "a", dense))
    dense[40] += 100
    with pytest.raises(
        ValueError, match=r"last change of its files? is .* ns .* there and .* here"
    ):
        begun(folder, stored(form, tmp_path / "b", dense))


def test_a_file_of_another_size(tmp_path):
    begun(tmp_path / "run", stored("memory map", tmp_path / "a", matrix()))
    longer = stored("memory map", tmp_path / "b", np.concatenate([matrix(), matrix()]))[:M]
    with pytest.raises(
        ValueError, match="size of its file is 1328 bytes there and 2528 bytes here"
    ):
        begun(tmp_path / "run", longer)


@pytest.mark.parametrize("form", ["memory map", "hdf5"])
def test_a_run_over_a_file_that_did_not_change_continues(form, tmp_path):
    first = begun(tmp_path / "run", stored(form, tmp_path / "a", matrix()))[1]
    path = tmp_path / ("a.npy" if form == "memory map" else "a")
    status = os.stat(path)
    os.rename(path, tmp_path / "moved")  # its name does not matter
    if form == "memory map":
        source = np.load(tmp_path / "moved", mmap_mode="r")
    else:
        source = pytest.importorskip("h5py").File(tmp_path / "moved")["a"]
    assert os.stat(tmp_path / "moved").st_mtime_ns == status.st_mtime_ns
    for got, expected in zip(begun(tmp_path / "run", source)[1], first, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_zarr_folder_in_which_one_chunk_changed(tmp_path):
    a = stored("zarr", tmp_path / "a", matrix())
    first = begun(tmp_path / "run", a)[1]
    for got, expected in zip(begun(tmp_path / "run", a)[1], first, strict=True):
        np.testing.assert_array_equal(got, expected)
    a[45, 5] += 1  # in rows that no product reads again
    with pytest.raises(ValueError, match=r"belongs to another run: .*last change of its files"):
        begun(tmp_path / "run", a)


def test_a_file_in_place_of_a_parent(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run cannot be made: .*; expected a folder"):
        begun(tmp_path / "file" / "run")


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(ValueError, match="state is a file; expected a folder"):
        begun(tmp_path / "state")
