"""The float64 tests, in a process with float64 switched on."""

import pytest
from cases import run_pytest


@pytest.mark.long
def test_float64_suite_passes():
    run_pytest("x64", "not long", JAX_ENABLE_X64="1")


@pytest.mark.long
def test_long_float64_suite_passes():
    run_pytest("x64", "long", JAX_ENABLE_X64="1")
