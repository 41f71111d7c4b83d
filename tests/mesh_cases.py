"""Meshes of devices, what travels between them in a compiled program, and several processes."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paper_checks.compiler import FLAGS

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


def run(script, *arguments, flags):
    """Start a script of `multidevice`."""
    environment = os.environ | {"XLA_FLAGS": f"{FLAGS} {flags}"}
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "multidevice" / script), *arguments],
        env=environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    """What a script wrote in JSON, on its last line."""
    try:
        out, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


def results_of_two(script, *arguments):
    """What two processes with two devices each wrote; they get an address and their index too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    processes = [run(script, address, str(i), *arguments, flags=flags) for i in range(2)]
    try:
        return [result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
