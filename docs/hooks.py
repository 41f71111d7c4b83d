"""What mkdocs runs: formulas become MathML, and pages are made from files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
OUTSIDE = {
    "](../../figures/README.md": "](results.md",
    "](../../figures/": "](figures/",
    "](../../paper_checks/REPORT.md": "](report.md",
    "](../../CONTRIBUTING.md": "](extending.md",
}
"""Beginnings of links, as readers of the repository follow them, and those of the site."""
FORMULAS = {r"\$`(.*?)`\$": r"\\(\1\\)", r"^```math\n(.*?)\n```$": r"\\[\n\1\n\\]"}
"""Formulas as GitHub reads them, and as the extension arithmatex does."""
TABLE = re.compile(r"^\[The table\]\(\.\./\.\./(figures/\w+\.md)\)$", re.MULTILINE)
"""A link that is replaced by the table to which it leads."""
REFERENCE = re.compile(r"^\[nyscaled\.[\w.]+\]: \S+\n?", re.MULTILINE)
"""Where readers of the repository find a name; in the site it is a link to the reference."""
ENTRY = re.compile(r"^### (\S+)\n\n\*\*", re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Render formulas without a script of another server."""

    def rendered(match: re.Match[str]) -> str:
        entities = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}
        latex = re.sub("&(amp|lt|gt);", lambda m: entities[m[0]], match[3])
        return convert(latex, display="block" if match[2] == "[" else "inline")

    return FORMULA.sub(rendered, html)


def results() -> str:
    """Return the page of figures: its pictures are in the site, its data and records are not."""
    text = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[(data|record|table)\]\(([\w.]+)\)", r"\1 in `figures/\2`", text)
    text = text.replace("](../docs/pages/", "](")
    return re.sub(r"\]\((\w+\.png)\)", r"](figures/\1)", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from files of the repository, and the pictures."""
    report = (ROOT / "paper_checks" / "REPORT.md").read_text(encoding="utf-8")
    # Code has no page of its own here: its place is given in words.
    report = re.sub(
        r"\[(`\w+`)\]\((claims/\w+\.py)#L(\d+)\)", r"\1 in `paper_checks/\2`, line \3", report
    )
    report = report.replace("../docs/pages/findings.md", "findings.md")
    pages = {
        "report.md": report,
        "changes.md": (ROOT / "CHANGELOG.md")
        .read_text(encoding="utf-8")
        .replace("[reproduction](docs/upstream/", "reproduction: `docs/upstream/")
        .replace("hang.py))", "hang.py`)"),
        "results.md": results(),
        "extending.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link the ids of claims, `{claims: lem-1, lem-2i}`, to the report, and files to their pages.

    Raises:
        ValueError: if an id names no claim, or the page of mathematics misses a claim.
    """
    report = (ROOT / "paper_checks" / "REPORT.md").read_text(encoding="utf-8")
    claims = {match[1] for match in ENTRY.finditer(report)}
    used: set[str] = set()

    def linked(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split(",")]
        missing = [name for name in names if name not in claims]
        if missing:
            raise ValueError(f"{page.file.src_uri} names claims that do not exist: {missing}")
        used.update(names)
        return ", ".join(f"[{name}](report.md#{name.lower()})" for name in names)

    markdown = TABLE.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), markdown)
    markdown = REFERENCE.sub("", markdown)
    for of_github, of_site in FORMULAS.items():
        markdown = re.sub(of_github, of_site, markdown, flags=re.DOTALL | re.MULTILINE)
    markdown = re.sub(r"\{claims: ([^}]*)\}", linked, markdown)
    for link, of_site in OUTSIDE.items():
        markdown = markdown.replace(link, of_site)
    left_out = claims - used
    if page.file.src_uri == "mathematics.md" and left_out:
        raise ValueError(f"mathematics.md does not name these claims: {sorted(left_out)}")
    return markdown
