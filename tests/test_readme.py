"""The README's snippets run, in order, and its links lead somewhere."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    solved, trained, predicted, adapted, merged = capsys.readouterr().out.split("\n")[:5]
    assert solved.startswith("CONVERGED")
    assert float(trained) < 1e-6
    assert float(predicted) < 1e-4
    first, *_, last = ast.literal_eval(adapted)
    assert last < first
    assert merged == "True"


def test_training_loop_is_short():
    loops = [
        s for s in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "nnx.Optimizer" in s
    ]
    assert len(loops) == 1
    assert len([line for line in loops[0].splitlines() if line.strip()]) <= 25


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    for link in local:
        assert (ROOT / link.split("#")[0]).exists(), link


def test_each_claim_is_linked_and_each_link_is_a_claim():
    linked = set(re.findall(r"REPORT\.md#([\w-]+)", README))
    report = (ROOT / "paper_checks" / "REPORT.md").read_text()
    assert linked == {name.lower() for name in re.findall(r"^### (\S+)$", report, re.MULTILINE)}


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w[\w-]*)", README):
        if target != "are":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
