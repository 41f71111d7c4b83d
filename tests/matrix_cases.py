"""Matrices of every kind: those that are taken and those that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import scipy.sparse
import scipy.sparse.linalg
from flax import nnx
from jax.experimental import sparse
from jax.tree_util import Partial

import nyscaled as nys
from nyscaled._pytree import pytree_dataclass
from nyscaled.matrices import transpose_times

M, N, R = 12, 8, 2
KEY = jax.random.key(0)


def made(shape):
    """A float32 array with rows and entries that are zero; symmetric if square."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))
    a[3] = 0
    a[:, 5] = 0
    if shape[0] == shape[1]:
        a = a @ a.T
    return a.astype(np.float32)


A = made((M, N))


@pytree_dataclass
class Diagonal:
    """An operator of somebody else: a pytree of JAX arrays with shape, dtype, T and @."""

    d: object

    shape = (M, M)
    dtype = jnp.dtype("float32")
    T = property(lambda self: self)

    def __matmul__(self, x):
        return self.d[:, None] * x


class NumpyBacked:
    """What has shape, dtype, T and @, and computes in NumPy."""

    def __init__(self, a):
        self.a, self.shape, self.dtype = a, a.shape, a.dtype

    @property
    def T(self):
        return NumpyBacked(self.a.T)

    def __matmul__(self, x):
        return self.a @ np.asarray(x)


class Lineax:
    """As lineax's operators: products by `mv`, and no shape."""

    T = property(lambda self: self)

    def __init__(self, a):
        self.matrix = a

    def mv(self, x):
        return self.matrix @ x


def doubled(a):
    """COO with every entry in two halves, out of order."""
    entries = scipy.sparse.coo_array(a)
    rows, columns = (np.tile(i[::-1], 2).astype(np.int64) for i in entries.coords)
    return scipy.sparse.coo_array((np.tile(entries.data[::-1] / 2, 2), (rows, columns)), a.shape)


def unsorted(a):
    """CSR with explicit zeros, and columns that fall."""
    m, n = a.shape
    columns = np.tile(np.arange(n)[::-1], m)
    return scipy.sparse.csr_array((a[:, ::-1].ravel(), columns, n * np.arange(m + 1)), a.shape)


def operator(a):
    a = jnp.asarray(a)
    return nys.linalg.Operator(Partial(jnp.matmul, a), Partial(transpose_times, a), a.shape)


FORMATS = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
DENSE = {
    "jax": jnp.asarray,
    "numpy": np.asarray,
    "numpy_float64": np.float64,
    "fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(">f4"),
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "matrix": np.matrix,
    "rows": lambda a: a.tolist(),
    "DataFrame": pandas.DataFrame,
    "nnx.Param": lambda a: nnx.Param(jnp.asarray(a)),
}
SPARSE = {
    **{f"{f}_array": getattr(scipy.sparse, f"{f}_array") for f in FORMATS},
    **{f"{f}_matrix": getattr(scipy.sparse, f"{f}_matrix") for f in FORMATS},
    "float64": lambda a: scipy.sparse.csr_array(a.astype(np.float64)),
    "doubled": doubled,
    "unsorted": unsorted,
    "BCOO": sparse.BCOO.fromdense,
    "BCOO_batch": lambda a: sparse.BCOO.fromdense(a, n_batch=1),
    "BCOO_dense": lambda a: sparse.BCOO.fromdense(a, n_dense=1),
    "BCOO_padded": lambda a: sparse.BCOO.fromdense(a, nse=a.size),
    "BCSR": sparse.BCSR.fromdense,
    "COO": sparse.COO.fromdense,
    "CSR": sparse.CSR.fromdense,
    "CSC": sparse.CSC.fromdense,
}
TAKEN = {**DENSE, **SPARSE, "Operator": operator}
REFUSED = {
    "LinearOperator": (scipy.sparse.linalg.aslinearoperator, "A is a .*LinearOperator"),
    "NumPy behind @": (NumpyBacked, "A is a NumpyBacked"),
    "lineax": (Lineax, "A is a Lineax; expected a dense array"),
    "masked": (lambda a: np.ma.masked_array(a, a > 1), "A is a MaskedArray"),
    "masked nowhere": (np.ma.masked_array, "A is a MaskedArray"),
    "object": (lambda a: a.astype(object), "A is a ndarray of dtype object"),
    "text": (lambda a: a.astype(str), "A is a ndarray of dtype <U"),
    "longdouble": (np.longdouble, "A is a ndarray of dtype float128|A has dtype float64"),
    "ragged": (lambda a: [[1.0, 2.0], [3.0]], "A is a list"),
    "DataFrame of text": (lambda a: pandas.DataFrame({"x": ["y"]}), "A is a DataFrame"),
    "integers": (lambda a: a.astype(np.int64), "A has dtype int"),
    "booleans": (lambda a: a > 0, "A has dtype bool"),
    "complex": (lambda a: a.astype(np.complex64), "A has dtype complex64"),
    "float16": (np.float16, "A has dtype float16"),
    "rows of integers": (lambda a: [[1, 2], [2, 5]], "A has dtype int32"),
    "vector": (lambda a: a[0], r"A has shape \(\d+,\)"),
    "stack": (lambda a: a[None], r"A has shape \(1, 12, \d+\)"),
    "sparse vector": (lambda a: scipy.sparse.coo_array(a[0]), r"A has shape \(\d+,\)"),
    "sparse integers": (lambda a: scipy.sparse.csr_array(a.astype(int)), "A has dtype int64"),
    "sparse booleans": (lambda a: scipy.sparse.lil_matrix(a > 0), "A has dtype bool"),
    "sparse complex": (lambda a: scipy.sparse.dok_array(a * 1j), "A has dtype complex"),
    "sparse longdouble": (lambda a: scipy.sparse.csr_array(np.longdouble(a)), "A has dtype float"),
    "BCSR of integers": (lambda a: sparse.BCSR.fromdense(a.astype(int)), "A has dtype int32"),
    "BCSR in batches": (
        lambda a: sparse.BCSR.fromdense(a[None], n_batch=1),
        r"A has shape \(1, 12, \d+\)",
    ),
    "too wide": (lambda a: scipy.sparse.csr_array((2, 2**31 + 5), dtype="f"), "A has shape"),
}
