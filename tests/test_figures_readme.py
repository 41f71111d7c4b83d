"""Each number of the pages of results that names its place in a record equals the record."""

import json
import re
from decimal import Decimal

import numpy as np
import pytest
from experiment_cases import ROOT, read_rows

FOLDER = ROOT / "figures"
RESULTS = ROOT / "docs" / "pages" / "finetuning_results.md"
SECTIONS = (FOLDER / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]
NUMBER = re.compile(r"([-\d.e]+)<!-- (.+?)\s-->", re.DOTALL)
REDUCTIONS = {"min": min, "max": max, "last": lambda values: values[-1]}


def numbers():
    for section in SECTIONS:
        name = re.search(r"\[data\]\((\w+)\.csv\)", section)[1]
        for number, place in NUMBER.findall(section):
            yield pytest.param(name, number, " ".join(place.split()), id=f"{name}: {place}")
    # A page with several records in a section names the record first.
    for number, place in NUMBER.findall(RESULTS.read_text(encoding="utf-8")):
        name, place = " ".join(place.split()).split(" | ", 1)
        yield pytest.param(name, number, place, id=f"{RESULTS.stem}, {name}: {place}")


def recorded(name, place):
    """The value at "panel | series | x" of a CSV, or at "json | key | …"; x may be a reduction."""
    head, *keys, last = place.split(" | ")
    if head == "json":
        value = json.loads((FOLDER / f"{name}.json").read_text())
        for key in (*keys, last):
            value = REDUCTIONS[key](value) if key in REDUCTIONS else value[key]
        return value
    (series,) = keys
    x, y = read_rows(FOLDER / f"{name}.csv")[head][series]
    if last in REDUCTIONS:
        return REDUCTIONS[last](y)
    (index,) = np.flatnonzero(np.isclose(x, float(last), rtol=1e-9))
    return y[index]


@pytest.mark.parametrize(("name", "number", "place"), list(numbers()))
def test_number_equals_its_record_in_all_digits(name, number, place):
    unit = 10.0 ** Decimal(number).as_tuple().exponent
    assert abs(float(number) - recorded(name, place)) <= 0.5001 * unit


def test_each_record_has_a_section():
    named = {re.search(r"\[data\]\((\w+)\.csv\)", section)[1] for section in SECTIONS}
    assert named == {path.stem for path in FOLDER.glob("*.csv")}
    for section in SECTIONS:
        for link in re.findall(r"\]\(([^)]+)\)", section):
            assert (FOLDER / link.split("#")[0]).exists(), link
