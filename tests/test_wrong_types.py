"""Arguments of types that annotations exclude, where nothing checks annotations."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = r"""
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx
from jax.experimental import sparse

import nyscaled as nys
from nyscaled.lowrank import HostOperator, RowBlocks, nystrom_preconditioner, one_pass
from nyscaled.lowrank import pivoted_cholesky
from nyscaled.sklearn import Nystroem

a = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
x = np.ones((5, 2), np.float32)
kernel = nys.linalg.KernelMatrix(nys.linalg.kernels.gaussian(), jnp.asarray(a))
PIPELINE = "tests/fixtures/diffusion/sd1"
latents, schedule = jnp.ones((1, 2, 2, 1)), nys.diffusion.Schedule()


def sampled(**options):
    return nys.diffusion.sample(lambda x, time: x, schedule, latents, steps=2, **options)


def operator():
    return HostOperator(lambda x: a @ x, lambda y: a.T @ y, a.shape, a.dtype)


net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
nys.lora.apply(net, 2, targets=".*", key=jax.random.key(0))


class Foreign:  # a matrix whose dtype NumPy does not know, as those of torch
    shape, dtype = a.shape, "torch.float32"

    def __getitem__(self, rows):
        return a[rows]


def stream(factory, shape=a.shape, dtype=a.dtype):
    return RowBlocks(factory, shape=shape, dtype=dtype).times(x)


REFUSED = [
    (lambda: operator().times(np.ones(5, "f")), "argument of .*A x has shape"),
    (lambda: operator().times(np.full((5, 1), "a")), "argument of .*A x has shape .*<U1"),
    (lambda: operator().adjoint_times(None), "argument of .*Aᴴ y has shape"),
    (lambda: jax.jit(operator().times)(x), "argument of .*A x is multiplied by NumPy and is"),
    (lambda: RowBlocks(a).times(np.ones(5, "f")), "argument of A x has shape"),
    (lambda: jax.jit(RowBlocks(a).times)(x), "argument of A x is multiplied by NumPy and is"),
    (lambda: jax.jit(lambda a: RowBlocks(a).times(x))(a), "is multiplied by NumPy and is traced"),
    *(
        (lambda shape=shape: HostOperator(np.copy, np.copy, shape, "f4"), "operator has shape")
        for shape in ("ab", None, 3, (3,), (3, 2.5), (0, 3), ((1, 2), 3), (3, 2, 1))
    ),
    *(
        (lambda dtype=dtype: HostOperator(np.copy, np.copy, (3, 2), dtype), "operator")
        for dtype in ("foo", None, 3, [], np.ones(2), "f4,,")
    ),
    (lambda: HostOperator(a, a.T, a.shape, a.dtype), "times is a ndarray; expected a function"),
    (lambda: stream(lambda: None), "gives no row blocks .TypeError"),
    (lambda: stream(lambda rows: iter([a])), "gives no row blocks .TypeError"),
    (lambda: stream(object), "gives no row blocks"),
    (lambda: stream(lambda: iter([None])), "rows 0 … of .* have shape .* and dtype object"),
    (lambda: stream(lambda: iter([[[1.0], [2.0, 3.0]]])), "rows 0 … of .* are a list"),
    (lambda: stream(lambda: "text"), "rows 0 … of .* have shape"),
    (lambda: stream(lambda: iter([a]), shape="ab"), "has shape 'ab'; expected a matrix"),
    (lambda: stream(lambda: iter([a]), shape=(12, 5.0)), "has shape .12, 5.0.; expected a matrix"),
    (lambda: stream(lambda: iter([a]), dtype=3), "dtype is 3; expected a dtype"),
    (lambda: RowBlocks(a, dtype="foo"), "dtype is 'foo'; expected a dtype"),
    (lambda: RowBlocks(Foreign()), "dtype of a Foreign is 'torch.float32'; expected a dtype"),
    *(
        (lambda shape=shape: nys.linalg.Operator(jnp.copy, jnp.copy, shape), "operator has shape")
        for shape in ("ab", None, 3, (3, 3.5), ((1, 2), 3))
    ),
    (lambda: nys.linalg.Operator(jnp.copy, jnp.copy, (3, 3), "foo"), "operator's dtype is 'foo'"),
    (lambda: RowBlocks(a, resume="x" * 300), "x cannot be made: .* expected a folder"),
    (lambda: RowBlocks(sparse.BCOO.fromdense(jnp.asarray(a))).times(x), "rows 0 … .* a BCOO"),
    *(
        (lambda folder=folder: RowBlocks(a, resume=folder), "resume is .*; expected the path")
        for folder in (True, 3, b"run", "", ["run"])
    ),
    (lambda: RowBlocks(a, block_bytes=2.5), "block_bytes is 2.5; expected an integer"),
    (lambda: RowBlocks(a, save_seconds="1"), "save_seconds is '1'; expected a number"),
    (lambda: one_pass([[[1.0], [2.0, 3.0]]], 1), "rows of block 0 are a list"),
    (lambda: one_pass("text", 1), "block 0 has shape"),
    (lambda: one_pass(a, "2"), "rank is '2'; expected an integer"),
    (lambda: one_pass(a, 2.0), "rank is 2.0; expected an integer"),
    *(
        (lambda fn=fn, key=key: fn(key), "(?s)key is .*; expected one key")
        for key in (0, "a", jax.random.split(jax.random.key(0)), np.zeros(2))
        for fn in (
            lambda key: one_pass(a, 2, key=key),
            lambda key: pivoted_cholesky(kernel, 2, key=key),
            lambda key: nys.nystrom(kernel, 2, key=key),
            lambda key: nys.nystrom(jnp.eye(9), 2, key=key),
        )
    ),
    (lambda: pivoted_cholesky(kernel, 2.0), "rank is 2.0; expected an integer"),
    (lambda: pivoted_cholesky(kernel, 2, tol=[0.1]), "tol is a list; expected a number"),
    (lambda: nys.nystrom(jnp.eye(9), 2.0), "rank is 2.0; expected an integer"),
    (lambda: nystrom_preconditioner(jnp.eye(9), 1.0), "approximation is a ArrayImpl; expected"),
    (lambda: Nystroem(kernel=["rbf"]).fit(a), "kernel is .'rbf'.; expected one of"),
    (lambda: Nystroem(gamma="scale").fit(a), "gamma is 'scale'; expected a number"),
    (lambda: Nystroem(gamma=[1.0, 2.0]).fit(a), "gamma is a list; expected a number"),
    (lambda: Nystroem(gamma=abs).fit(a), "gamma is a function; expected a number"),
    (lambda: Nystroem(lambda x, y: x @ y, kernel_params=3).fit(a), "kernel_params is 3; expected"),
    *(
        (lambda wrap=wrap: wrap(1e-4), "inner is a float; expected an optax transformation")
        for wrap in (nys.nora_plus, nys.lora_p, nys.reflora, nys.reflora_s)
    ),
    (lambda: nys.nora_plus(optax.sgd), "inner is a function; expected an optax transformation"),
    (lambda: nys.lora_plus(optax.sgd(0.1)), "optimizer is a .*; expected a constructor"),
    (lambda: nys.lora_plus(optax.sgd, None), "learning_rate is None; expected a number"),
    (lambda: nys.lora_plus(lambda rate: rate), "what optimizer returns is a float; expected an"),
    (lambda: nys.nora_plus(optax.GradientTransformation), "inner is a type; expected an optax"),
    *(
        (lambda fn=fn: fn(nys.diffusion.outline(PIPELINE), "nowhere"), "unet is a Pipeline; expec")
        for fn in (nys.lora.save_diffusers, nys.lora.load_diffusers)
    ),
    (lambda: nys.diffusion.Schedule().signal_to_noise("ab"), "times is a str; expected a dense"),
    (lambda: sampled(sampler=["ddim"]), "sampler is .'ddim'.; expected one of"),
    (lambda: sampled(sampler="ddpm", key=0), "key is 0; expected one key"),
    (lambda: nys.lora.activate(net, None), "names is None; expected a sequence of names"),
    (lambda: nys.lora.activate(net, [1]), "a name is 1; expected a string"),
    (lambda: nys.lora.activate(net, [None]), "a name is None; expected a string"),
    (lambda: nys.lora.activate(net, rows=[["default"]]), "a name is .'default'.; expected a"),
    (lambda: nys.lora.activate(net, rows=3), "rows is 3; expected a sequence of names"),
    (lambda: nys.scale_by_gram(lambda count: 0.1), "damping is a function; expected a number"),
]
ACCEPTED = [
    lambda: nys.scaled_gd(optax.constant_schedule(0.5)),
    lambda: nys.precgd(optax.constant_schedule(0.5)),
    lambda: one_pass(a, jnp.asarray(3)),
    lambda: one_pass(a, np.int64(3), key=jax.random.PRNGKey(0)),
    lambda: pivoted_cholesky(kernel, jnp.asarray(3)),
    lambda: nys.nystrom(kernel, jnp.asarray(3)),
    lambda: nys.nystrom(jnp.eye(9), jnp.asarray(3)),
    lambda: one_pass(scipy.sparse.csr_array(a), 3),
    lambda: HostOperator(np.copy, np.copy, np.array([3, 2]), "float32"),
    lambda: RowBlocks(a, block_bytes=jnp.asarray(100)),
]
"""

CHECKS = r"""
import re
import sys

faults = []
for number, (call, message) in enumerate(REFUSED):
    try:
        call()
        faults.append(f"case {number} ({message}) is accepted")
    except ValueError as error:
        if not re.search(message, str(error)):
            faults.append(f"case {number} ({message}) says: {error}")
    except BaseException as error:
        faults.append(f"case {number} ({message}) raises {type(error).__name__}: {error}")
for call in ACCEPTED:
    call()
sys.exit("\n".join(faults) or 0)
"""


@pytest.mark.long
def test_arguments_of_other_types_are_a_value_error():
    code = [sys.executable, "-c", CASES + CHECKS]
    root = Path(__file__).parents[1]
    result = subprocess.run(code, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
