"""The benchmark of the factorization runs; what it measures is not asserted."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lowrank.py"


def test_the_tables_of_factorizations():
    command = [sys.executable, str(SCRIPT), "--quick"]
    tables = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert tables.count("| sklearn randomized_svd") == 5
    assert tables.count("| rank 20, ") == 4
