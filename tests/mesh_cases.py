"""Meshes of the devices of this process, and what travels between them in a compiled program."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SPECS = {"rows": P("rows", None), "columns": P(None, "rows"), "both": P("rows", "columns")}
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)}|collective-broadcast)(?:-start)?\(")
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


def split(layout, devices=8, axis_type=AxisType.Auto):
    """A sharding by rows, by columns, or by both."""
    shape = (devices // 2, 2) if layout == "both" else (devices, 1)
    grid = np.asarray(jax.devices()[:devices]).reshape(shape)
    mesh = Mesh(grid, ("rows", "columns"), axis_types=(axis_type,) * 2)
    return NamedSharding(mesh, SPECS[layout])


def collectives(text):
    """The kind and the numbers of entries of each result of a collective, of compiled HLO."""
    return [
        (kind, math.prod(map(int, filter(None, dims.split(",")))))
        for results, kind in _COLLECTIVE.findall(text)
        for dims in _SHAPE.findall(results)
    ]


def compiled(fn, shape, sharding, dtype=np.float32):
    """The program for a matrix of this shape, which is not made."""
    return jax.jit(fn).lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)).compile()
