"""What travels when a matrix is factorized for a tolerance, read from the folder of XLA's dumps."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowrank_cases import matrix
from mesh_cases import collectives, split

import nyscaled as nys

M, N = 256, 64


def traffic(fn, a):
    """The collectives of all programs that are compiled for fn(a), of single operations too."""
    folder = Path(sys.argv[1])
    before = set(folder.iterdir())
    fn(a)
    programs = set(folder.glob("*after_optimizations.txt")) - before
    return sorted({pair for program in programs for pair in collectives(program.read_text())})


jax.config.update("jax_enable_compilation_cache", False)  # what is cached is not dumped
rows = split("rows")
a = matrix(M, N, 0.7 ** np.arange(N))
once = jax.device_put(a, rows)
twice = jax.device_put(np.concatenate([a, a]), rows)  # which has the same right vectors
found = [
    traffic(lambda a: nys.factorize(a, tol=1e-2).left.block_until_ready(), b) for b in (once, twice)
]
whole = NamedSharding(rows.mesh, P())
found.append(traffic(lambda a: jax.jit(lambda a: 2 * a, out_shardings=whole)(a), once))
print(json.dumps(found))
