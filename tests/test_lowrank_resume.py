"""Runs over a stream that are killed or break off, and continue from their folder."""

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
@pytest.mark.long_beyond(1)
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


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "state").write_text("")
    with pytest.raises(ValueError, match="state is a file; expected a folder"):
        begun(tmp_path / "state")
