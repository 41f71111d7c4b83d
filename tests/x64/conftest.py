"""These tests are about rounding at 1e-16."""

import jax


def pytest_configure():
    assert jax.config.jax_enable_x64, "run with JAX_ENABLE_X64=1 (tests/test_x64.py does)"
