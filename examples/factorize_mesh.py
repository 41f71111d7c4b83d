"""Factorize a matrix that is split over the devices of a mesh, here eight of one CPU."""

# region mesh
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nyscaled as nys

jax.config.update("jax_num_cpu_devices", 8)  # before any other use of JAX
mesh = jax.make_mesh((4, 2), ("rows", "columns"))
m, n = 4096, 1024


def entries(part):
    """The entries of a device, from anywhere: a slice of a memory map, say."""
    i, j = np.arange(m)[part[0], None], np.arange(n)[part[1]]
    return np.exp(-np.abs(i / m - j / n)).astype(np.float32)


a = jax.make_array_from_callback((m, n), NamedSharding(mesh, P("rows", "columns")), entries)
f = nys.factorize(a, tol=1e-2)
print(len(f.singular_values), float(f.relative_error))
for x in (a, f.left, f.right):
    print(x.shape, x.addressable_shards[0].data.shape)  # of all, and on one device
# endregion mesh
