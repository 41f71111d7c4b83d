"""Batched LAPACK calls of one CPU program that can wait for one another for ever.

    python docs/upstream/batched_lapack_hang.py [seconds] [operation]

jaxlib 0.10.2's CPU kernels of a batch (`lapack_sgesdd_ffi`, `lapack_spotrf_ffi`,
`lapack_ssyevd_ffi`, …) split it into tasks for XLA's intra-op thread pool and then block until they
are done, in the thread that called the kernel. The thunk executor runs independent calls of a
program on the threads of that same pool. When as many calls as the pool has threads have started
and none of their tasks has, every thread waits for a task that no thread is left to take. On two
cores two calls are enough.

It is a matter of timing: most runs end. This program repeats several independent batched calls for
the given time (60 s by default), and reports a hang, with exit status 1, when one repetition takes
longer than 30 s. `svd` (the default), `eigh`, `cholesky` and `qr` are the operations. Seen on two
cores with jax 0.10.2, jaxlib 0.10.2, Linux, CPython 3.11, in a larger program (SVDs of several
starts of one iteration under `jax.vmap`); this program alone has not met it yet where we ran it.

None of these hangs: a batch of one matrix, which is not split (`jax.lax.map` over the batch, what
`nyscaled.lapack` does); `XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`, which has no pool. Making
the calls depend on one another within a program is not enough, as two programs share the pool.
"""

import os
import sys
import threading
import time

import jax
import jax.numpy as jnp

CALLS, BATCH, ROWS, COLUMNS = 12, 4, 200, 20
PATIENCE = 30.0  # seconds
OPERATIONS = {
    "svd": lambda a: jnp.linalg.svd(a, full_matrices=False)[0],
    "eigh": lambda a: jnp.linalg.eigh(a.T @ a)[1],
    "cholesky": lambda a: jnp.linalg.cholesky(a.T @ a),
    "qr": lambda a: jnp.linalg.qr(a)[0],
}


def main(seconds: float = 60.0, operation: str = "svd") -> None:
    one = jax.vmap(OPERATIONS[operation])
    program = jax.jit(lambda x: [one(x * (i + 1.0)) for i in range(CALLS)])
    x = jax.random.normal(jax.random.key(0), (BATCH, ROWS, COLUMNS))
    jax.block_until_ready(program(x))
    count, last = 0, time.monotonic()

    def watch() -> None:
        while time.monotonic() - last < PATIENCE:
            time.sleep(1.0)
        print(f"HANG after {count} repetitions (jax {jax.__version__})", flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    end = last + seconds
    while last < end:
        jax.block_until_ready(program(x))
        count, last = count + 1, time.monotonic()
    print(f"{count} repetitions without a hang (jax {jax.__version__})")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *sys.argv[2:3])
