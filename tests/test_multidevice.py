"""The tests over a mesh, in a process with eight devices."""

from cases import run_pytest


def test_mesh_suite_passes():
    level = "--xla_backend_optimization_level=1"
    run_pytest("multidevice", XLA_FLAGS=f"{level} --xla_force_host_platform_device_count=8")
