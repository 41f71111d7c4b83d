"""The tests over a mesh, in a process with eight devices."""

import pytest
from cases import run_pytest

from paper_checks.compiler import FLAGS

DEVICES = f"{FLAGS} --xla_force_host_platform_device_count=8"


@pytest.mark.long
def test_mesh_suite_passes():
    run_pytest("multidevice", "not long", XLA_FLAGS=DEVICES)


@pytest.mark.long
def test_long_mesh_suite_passes():
    run_pytest("multidevice", "long", XLA_FLAGS=DEVICES)
