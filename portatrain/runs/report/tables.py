"""Sections and tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, body: str) -> str:
    """Return a heading and what is below it."""
    return f"<h2>{escape(title)}</h2>{body}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: Sequence[int] = ()) -> str:
    """Return a table. Cells are text, but for the columns `raw`, which are HTML."""
    lines = ["<table><tr>", *(f"<th>{escape(h)}</th>" for h in head), "</tr>"]
    for row in rows:
        cells = "".join(f"<td>{cell if i in raw else escape(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return "".join([*lines, "</table>"])
