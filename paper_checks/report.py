"""REPORT.md, and how a generated one is held against the committed one."""

from __future__ import annotations

from paper_checks.claim import Measured, Outcome


def margin(measured: Measured) -> str:
    return f"{measured.margin:.2g}" if measured.margin <= 1e4 else "> 1e4"


def render(outcomes: list[Outcome]) -> str:
    return ""
