"""The README is short, its snippets run in order, and links of all pages lead somewhere."""

import re
from pathlib import Path

import pytest

from paper_checks.framework.registry import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ROOT / "docs" / "pages"
ON_GITHUB = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "figures/README.md")
    ),
    *PAGES.glob("*.md"),
]


def test_is_short():
    assert len(README.splitlines()) <= 140


def test_snippets_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("CONVERGED")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", ON_GITHUB, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link.split("#")[0]).exists(), link


def test_each_claim_is_on_the_page_of_mathematics():
    lists = re.findall(r"\{claims: ([^}]*)\}", (PAGES / "mathematics.md").read_text())
    named = [name.strip() for names in lists for name in names.split(",")]
    assert sorted(named) == sorted(registry())


def test_pages_include_all_sections_of_the_examples():
    included = set()
    for page in PAGES.rglob("*.md"):
        included |= set(re.findall(r'^--8<-- "([^":]+:\w+)"$', page.read_text(), re.MULTILINE))
    marked = set()
    for script in (ROOT / "examples").glob("*.py"):
        for section in re.findall(r"--8<-- \[start:(\w+)\]", script.read_text()):
            assert f"[end:{section}]" in script.read_text()
            marked.add(f"examples/{script.name}:{section}")
    assert included == marked


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in (ROOT / "README.md", *PAGES.glob("*.md")):
        for target in re.findall(r"(?:^|`)make (\w[\w-]*)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)
