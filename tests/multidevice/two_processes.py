"""One of two processes, each with two devices and half of the rows."""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowrank_cases import matrix

import nyscaled as nys

M, N, RANK = 256, 64, 4

jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, num_processes=2, process_id=process)


def shared(a, axis_type=AxisType.Auto):
    """A, of which this process holds its half."""
    mesh = jax.make_mesh((jax.device_count(),), ("rows",), axis_types=(axis_type,))
    half = len(a) // 2
    part = a[process * half : (process + 1) * half]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("rows")), part, a.shape)


def deviation(fn, a, axis_type=AxisType.Auto):
    """By how much the result differs from that of this process for the whole matrix."""
    leaves, expected = jax.tree.leaves(fn(shared(a, axis_type))), jax.tree.leaves(fn(a))
    return max(
        float(np.max(np.abs(np.asarray(part) - np.asarray(y)[index])))
        for x, y in zip(leaves, expected, strict=True)
        for part, index in parts(x)
    )


def parts(x):
    """What this process has of a leaf, with its place; of the status all."""
    if not isinstance(x, jax.Array):
        return [(x, ())]
    return [(part.data, part.index) for part in x.addressable_shards]


a = matrix(M, N, 0.7 ** np.arange(N))
found = {
    "devices": len(shared(a).sharding.device_set),
    "rank": deviation(lambda a: nys.factorize(a, RANK), a),
    "explicit": deviation(lambda a: nys.factorize(a, RANK), a, AxisType.Explicit),
    "tolerance": deviation(lambda a: nys.factorize(a, tol=1e-2), a),
    "nystrom": deviation(lambda a: nys.nystrom(a, RANK), a.T @ a),
}
print(json.dumps(found))
