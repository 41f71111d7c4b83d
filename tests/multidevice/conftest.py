"""These tests need a mesh of eight devices."""

import jax


def pytest_configure():
    assert jax.device_count() == 8, (
        "run with XLA_FLAGS=--xla_force_host_platform_device_count=8, see tests/test_multidevice.py"
    )
