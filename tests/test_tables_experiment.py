"""experiments/table2.py, table4.py and table9.py in their quick forms."""

import json

import pytest
from experiment_cases import read_rows

from experiments import table2, table4, table9


@pytest.mark.long
def test_table_2_chooses_by_validation_and_goes_on(tmp_path):
    table2.main(table2.Config(out=tmp_path, quick=True))
    scores = read_rows(tmp_path / "table2.csv", ("seed", "score"))["sst2"]
    assert {method: len(y) for method, (_, y) in scores.items()} == {"lora": 2, "nora": 2}
    how = json.loads((tmp_path / "table2.json").read_text())
    assert how["chosen"]["sst2"]["lora"] == [0.01, None]
    assert how["chosen"]["sst2"]["nora"][1] in (0.1, 0.2)
    assert (tmp_path / "table2.md").read_text().startswith("| method | sst2 | seeds |\n")


@pytest.mark.long
def test_table_4_scores_the_sets_that_there_are(tmp_path):
    table4.main(table4.Config(out=tmp_path, quick=True))
    scores = read_rows(tmp_path / "table4.csv", ("seed", "score"))
    assert scores.keys() == {"boolq", "ARC-Easy"}
    with pytest.raises(ValueError, match="has no test sets"):
        table4.main(table4.Config(out=tmp_path, data=tmp_path))


@pytest.mark.long
def test_a_smoke_run_of_table_9_has_no_accuracy(tmp_path, capsys):
    table9.main(table9.Config(out=tmp_path, quick=True))
    assert "no accuracy is meant" in capsys.readouterr().out
    how = json.loads((tmp_path / "table9.json").read_text())
    assert how["smoke"]
    assert not any("accuracy" in key or "score" in key for key in how)
    assert not (tmp_path / "table9.csv").exists()
