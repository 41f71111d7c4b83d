"""Benchmarks against other tools run; what they measure is not asserted."""

import subprocess
import sys
from pathlib import Path

MINILM = Path(__file__).parents[2] / "build" / "weights" / "all-MiniLM-L6-v2"
FOLDER = Path(__file__).parents[2] / "benchmarks"


def output_of(script, *options):
    command = [sys.executable, str(FOLDER / script), "--quick", *map(str, options)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_table_and_the_picture_of_growth(tmp_path):
    out = tmp_path / "growth.png"
    assert output_of("lowrank_growth.py", "--out", out).count("\n| rank k") == 3
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_table_of_files():
    assert output_of("lowrank_dask.py").count("| nys.factorize") == 2


def test_the_tables_of_factorizations():
    tables = output_of("lowrank.py")
    assert tables.count("| sklearn randomized_svd") == 5
    assert tables.count("| rank 20, ") == 4


def test_the_table_of_whole_runs():
    assert output_of("finetune_run.py", "--model", MINILM).count("| all-MiniLM") == 4


def test_the_tables_of_stable_diffusion():
    assert output_of("diffusion.py").count("\n| tiny") == 4
