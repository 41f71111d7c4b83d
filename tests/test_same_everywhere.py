"""The report does not depend on rounding, instruction set and number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paper_checks.compiler import FLAGS
from paper_checks.framework.registry import registry

ROOT = Path(__file__).parent.parent


def check(*command, threads=None, **environment):
    """Run a check of the report in a process of its own; fail with the lines that differ."""

    def pin():
        if threads:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    if threads and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no way to run a process on a part of its processors")
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=pin,
    )
    assert done.returncode == 0, done.stdout + done.stderr


by_hand = pytest.mark.everywhere


@by_hand
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_report_does_not_change_when_each_product_is_rounded_otherwise(seed):
    check("tests/perturb.py", str(seed), "--check", XLA_FLAGS=FLAGS)


@pytest.mark.long
def test_claims_hold_when_each_product_is_rounded_otherwise():
    """A fourth of them, as each compiles all of its programs again."""
    some = (f"--only={claim}" for claim in list(registry())[::4])
    check("tests/perturb.py", "1", *some, XLA_FLAGS=FLAGS)


# The names are XLA's and, for what NumPy multiplies, OpenBLAS's.
@by_hand
@pytest.mark.parametrize(
    ("isa", "blas", "threads"),
    [
        ("AVX2", "Haswell", 1),
        ("AVX2", "Haswell", 2),
        ("SSE4_2", "Nehalem", 1),
        ("SSE4_2", "Nehalem", 2),
    ],
)
def test_report_does_not_change_with_the_instruction_set(isa, blas, threads):
    flags = {"XLA_FLAGS": f"{FLAGS} --xla_cpu_max_isa={isa}", "OPENBLAS_CORETYPE": blas}
    command = ("-m", "paper_checks", "--workers", "1", "--check")
    check(*command, threads=threads, OPENBLAS_NUM_THREADS=str(threads), **flags)


@pytest.mark.long
def test_the_perturbation_moves_products_by_an_ulp():
    code = (
        "import perturb, jax, jax.numpy as jnp; f = lambda a: a @ a; a = jnp.full((4, 4), 0.3);"
        "exact = jax.jit(f)(a); jax.clear_caches(); perturb.install(1);"
        "moved = jnp.abs(jax.jit(f)(a) / exact - 1).max();"
        "assert 1e-8 < moved < 2.5e-7, moved"
    )
    check("-c", code, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
