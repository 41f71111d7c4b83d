"""The float64 tests, in a process with float64 switched on."""

from cases import run_pytest


def test_float64_suite_passes():
    run_pytest("x64", JAX_ENABLE_X64="1")
