"""The tests over a mesh, in a process with eight devices."""

from cases import run_pytest


def test_mesh_suite_passes():
    run_pytest("multidevice", XLA_FLAGS="--xla_force_host_platform_device_count=8")
