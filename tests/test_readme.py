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
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    solved, factorized = capsys.readouterr().out.splitlines()
    assert solved.startswith("CONVERGED")
    rank, error = factorized.split()
    assert rank == "19"
    assert abs(float(error) - 0.0025) < 1e-4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def anchors(page):
    """What links may name behind `#` on GitHub: ids, and headings without punctuation."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", re.sub(r"<[^>]*>", "", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", ON_GITHUB, ids=lambda page: page.name)
def test_links_lead_to_files_and_anchors(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), link
            assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_references_lead_to_the_definitions(page):
    text = page.read_text()
    places = dict(re.findall(r"^\[(nyscaled\.[\w.]+)\]: (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[(nyscaled[^]]*)\]", text)) == places.keys()
    for name, place in places.items():
        definition = rf"^ *(def|class) {name.split('.')[-1]}\b"
        assert re.search(definition, (page.parent / place).read_text(), re.MULTILINE), name


def test_each_claim_is_on_the_page_of_mathematics():
    lists = re.findall(r"\{claims: ([^}]*)\}", (PAGES / "mathematics.md").read_text())
    named = [name.strip() for names in lists for name in names.split(",")]
    assert sorted(named) == sorted(registry())


def test_code_of_the_pages_is_that_of_the_examples():
    """A comment before a block names its part of a script; each part is on some page."""
    block = re.compile(r"<!-- (examples/\w+\.py: \w+) -->\n```python\n(.*?)\n```", re.DOTALL)
    region = re.compile(r"^# region (\w+)\n(.*?)\n+# endregion \1$", re.DOTALL | re.MULTILINE)
    parts = {
        f"examples/{script.name}: {name}": code
        for script in (ROOT / "examples").glob("*.py")
        for name, code in region.findall(script.read_text())
    }
    shown = [pair for page in PAGES.glob("*.md") for pair in block.findall(page.read_text())]
    for name, code in shown:
        assert code == parts[name].strip("\n"), name
    assert {name for name, _ in shown} == parts.keys()


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in (ROOT / "README.md", *PAGES.glob("*.md")):
        for target in re.findall(r"(?:^|`)make (\w[\w-]*)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)
