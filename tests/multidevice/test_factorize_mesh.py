"""`nys.factorize` and `nys.nystrom` of matrices that are split over a mesh."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowrank_cases import matrix
from mesh_cases import collectives, compiled, result, results_of_two, run, split

import nyscaled as nys
from nyscaled.lowrank.by_rank import PROBES

M, N, RANK = 256, 64, 4
WIDTH = RANK + 4  # columns of a product
TALL, WIDE = 16 * M, 8 * N  # where only the shapes matter


def by_rank(a):
    return nys.factorize(a, RANK, oversampling=WIDTH - RANK)


def traffic(fn, shape, layout):
    return collectives(compiled(fn, shape, split(layout)).as_text())


@pytest.fixture(scope="module")
def a():
    return matrix(M, N, 0.7 ** np.arange(N))


def agree(f, expected):
    """The parts of two factorizations are equal but for rounding."""
    for x, y in zip(jax.tree.leaves(f), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def specs(*arrays):
    """By what each is split, without the axes that are whole at the end."""
    whole = [tuple(x.sharding.spec) + (None,) * x.ndim for x in arrays]
    return [spec[: x.ndim] for spec, x in zip(whole, arrays, strict=True)]


def test_by_rows_what_travels_does_not_grow_with_the_rows():
    found = traffic(by_rank, (TALL, N), "rows")
    assert Counter(found) == Counter(traffic(by_rank, (2 * TALL, N), "rows"))
    # Aᴴ y, where the probes help to span the range of an A of this rank
    assert max(size for _, size in found) == (WIDTH + PROBES) * N
    assert {kind for kind, size in found if size > WIDTH**2} == {"all-reduce"}


def test_by_rows_and_columns_thin_pieces_travel():
    found = traffic(by_rank, (TALL, WIDE), "both")
    image, coimage = TALL // 4, WIDE // 2  # the rows of A x and of Aᴴ y on a device
    large = Counter(pair for pair in found if pair[1] > coimage * (WIDTH + PROBES))
    # The first product, with probes, and two more; those with Aᴴ are smaller.
    assert large == {
        ("all-reduce", image * (WIDTH + PROBES)): 1,
        ("all-reduce", image * WIDTH): 2,
    }
    assert ("all-reduce", coimage * WIDTH) in found
    assert all(kind == "all-reduce" for kind, size in found if size > 4 * RANK)


def test_a_gathered_matrix_is_seen():
    def gathering(a):
        whole = NamedSharding(split("rows").mesh, P())
        return by_rank(jax.lax.with_sharding_constraint(a, whole))

    assert ("all-gather", TALL * N) in traffic(gathering, (TALL, N), "rows")
    sizes = [max(traffic(gathering, (m, N), "rows"))[1] for m in (TALL, 2 * TALL)]
    assert sizes[1] == 2 * sizes[0]


def test_nystrom_gathers_the_thin_block_that_it_multiplies():
    m = 1024
    found = traffic(lambda a: nys.nystrom(a, RANK), (m, m), "rows")
    columns = RANK + 10
    assert max(size for _, size in found) == m * columns
    assert found.count(("all-gather", m * columns)) == 3  # passes


def test_nystrom_of_a_kernel_leaves_points_where_they_are():
    def of_points(points):
        kernel = nys.linalg.kernels.gaussian(0.3)
        return nys.nystrom(nys.linalg.KernelMatrix(kernel, points), RANK)

    program = compiled(of_points, (TALL, 3), split("rows"))
    groups = round(TALL**0.5)  # of points, of which one is looked at for each pivot
    assert max(size for _, size in collectives(program.as_text())) == RANK * groups
    assert program.output_shardings.vectors.spec[0] == "rows"


@pytest.mark.long
def test_a_gradient_is_split_as_the_matrix():
    def nuclear(a):
        return jnp.sum(by_rank(a).singular_values)

    program = compiled(jax.grad(nuclear), (TALL, N), split("rows"))
    assert max(size for _, size in collectives(program.as_text())) == (WIDTH + PROBES) * N
    assert program.output_shardings.spec[0] == "rows"


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("layout", ["rows", "both"])
def test_memory_of_a_device_is_its_part(layout):
    shape = (4 * TALL, 16)

    def memory(devices):
        stats = compiled(by_rank, shape, split(layout, devices)).memory_analysis()
        return stats.argument_size_in_bytes, stats.temp_size_in_bytes

    (whole, working), (part, working_part) = memory(2), memory(8)
    key = 64  # bytes, at most
    assert 4 * part <= whole + 4 * key
    assert working_part < 0.3 * working


@pytest.mark.long_beyond(1)
@pytest.mark.parametrize("layout", ["both", "rows", "columns"])
@pytest.mark.parametrize("tall", [True, False])
def test_a_rank_on_a_mesh(a, layout, tall):
    a = a if tall else a.T
    f = nys.factorize(jax.device_put(a, split(layout)), RANK)
    agree(f, nys.factorize(a, RANK))
    rows, columns = split(layout).spec
    assert specs(f.left, f.right, f.error_estimate) == [(rows, None), (columns, None), ()]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["rows", "both"])
def test_a_tolerance_on_a_mesh(a, layout):
    f = nys.factorize(jax.device_put(a, split(layout)), tol=1e-2)
    agree(f, nys.factorize(a, tol=1e-2))
    rows, columns = split(layout).spec
    assert specs(f.left, f.right, f.error_estimate) == [(rows, None), (columns, None), ()]


@pytest.mark.long
def test_results_do_not_depend_on_how_many_devices_there_are(a):
    for options in ({"rank": RANK}, {"tol": 1e-2}):
        two, eight = (
            nys.factorize(jax.device_put(a, split("rows", devices)), **options)
            for devices in (2, 8)
        )
        agree(two, eight)


@pytest.mark.long
def test_nystrom_on_a_mesh(a):
    square = a.T @ a
    psd = nys.nystrom(jax.device_put(square, split("rows")), RANK)
    agree(psd, nys.nystrom(square, RANK))
    assert specs(psd.vectors) == [("rows", None)]


@pytest.mark.long
def test_half_precision_and_complex_matrices_on_a_mesh(a):
    for b in (jnp.asarray(a, jnp.bfloat16), a * np.exp(1j * np.arange(N)).astype(np.complex64)):
        agree(nys.factorize(jax.device_put(b, split("both")), RANK), nys.factorize(b, RANK))


@pytest.mark.long
def test_entries_of_a_sparse_matrix_stay_where_they_are(a):
    a = np.where(np.abs(a) > np.quantile(np.abs(a), 0.75), a, 0)
    entries = sparse.BCOO.fromdense(a)
    rows = split("rows")
    data = jax.device_put(entries.data, NamedSharding(rows.mesh, P("rows")))
    b = sparse.BCOO((data, jax.device_put(entries.indices, rows)), shape=a.shape)
    text = jax.jit(by_rank).lower(b).compile().as_text()
    assert {kind for kind, _ in collectives(text)} == {"all-reduce"}
    assert max(size for _, size in collectives(text)) == M * (WIDTH + PROBES)
    agree(nys.factorize(b, RANK), nys.factorize(a, RANK))


@pytest.mark.long
def test_a_mesh_with_explicit_axes(a):
    explicit = split("both", axis_type=AxisType.Explicit)
    b = jax.device_put(a, explicit)
    f = nys.factorize(b, RANK)
    assert f.left.sharding.mesh == explicit.mesh
    agree(f, nys.factorize(a, RANK))
    agree(nys.factorize(b, tol=1e-2), nys.factorize(a, tol=1e-2))
    with jax.set_mesh(explicit.mesh):
        agree(nys.factorize(b, RANK, key=jax.random.key(0)), f)
        square = a.T @ a
        psd = nys.nystrom(jax.device_put(square, explicit), RANK)
        assert psd.factor.sharding.mesh.axis_types == explicit.mesh.axis_types
    agree(psd, nys.nystrom(square, RANK))
    kernel = nys.linalg.kernels.gaussian()
    points = jax.device_put(a[:, :2], explicit)
    pivoted = nys.lowrank.pivoted_cholesky(nys.linalg.KernelMatrix(kernel, points), RANK)
    assert pivoted.factor.sharding.mesh == explicit.mesh
    with pytest.raises(ValueError, match="A is traced and lies on a mesh with Explicit axes"):
        jax.jit(by_rank)(b)


def test_row_blocks_of_a_matrix_on_a_mesh_with_explicit_axes(a):
    explicit = split("both", axis_type=AxisType.Explicit)
    stream = nys.lowrank.RowBlocks(jax.device_put(a, explicit), block_bytes=a.nbytes // 8)
    x = np.eye(N, RANK, dtype=np.float32)
    np.testing.assert_allclose(stream.times(x), a[:, :RANK], atol=1e-6)


@pytest.mark.long
def test_for_a_tolerance_what_travels_does_not_grow_with_the_rows(tmp_path):
    flags = (
        f"--xla_force_host_platform_device_count=8 --xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    )
    first, second, control = result(run("tolerance_traffic.py", str(tmp_path), flags=flags))
    assert first
    assert all(collective in first for collective in second)
    assert 4 * max(size for _, size in first) < M * N
    assert max(size for _, size in control) == M * N  # gathered


@pytest.mark.long
def test_two_processes_give_the_same_result():
    results = results_of_two("two_processes.py")
    for deviations in results:
        assert deviations["devices"] == 4
        for name in ("rank", "explicit", "tolerance", "nystrom"):
            assert deviations[name] < 1e-5
