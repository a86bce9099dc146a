"""The kinds of events have one home, and one reading of how an attempt ended."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.runs.events import Kind, how_it_ended, last, why_it_ended

ROOT = Path(__file__).parents[2]
KINDS = {str(kind) for kind in Kind}
PLAIN = {"start", "end", "eval", "left", "skipped", "stopped", "interrupted", "preempted", "cancelled", "task"}
"""Words that also mean something else; the others are found wherever they stand."""


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Kinds that are written as text: as an event's kind, compared with one, or anywhere if they mean nothing else."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("event", "events")
        ):
            found = node.args[:1]
        elif isinstance(node, ast.Compare) and "event" in ast.unparse(node):
            found = [node.left, *node.comparators]
        elif isinstance(node, ast.Constant) and node.value in KINDS - PLAIN - {"saving", "stopping", "hang", "resumed"}:
            found = [node]
        for one in found:
            for inner in ast.walk(one):
                if isinstance(inner, ast.Constant) and inner.value in KINDS:
                    yield inner.lineno, inner.value


def test_no_file_but_the_table_writes_a_kind_as_text() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for folder in ("portatrain", "launchers")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "portatrain" / "runs" / "events.py"
        for line, text in literals(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize(
    "text",
    ['attempt.event("left")', 'run.events("end")', 'e["event"] == "hang"', 'x = "gave_up"', 'event in ("left",)'],
)
def test_a_planted_kind_is_found(text: str) -> None:
    assert list(literals(ast.parse(text)))


def test_a_kind_is_its_text() -> None:
    assert f"{Kind.LEFT}" == "left" == Kind.LEFT and len(KINDS) == len(Kind)


@pytest.mark.parametrize(
    ("rows", "ended"),
    [
        ([], ""),
        ([{"event": "start"}], ""),
        ([{"event": "hang"}], "hung"),
        ([{"event": "end", "status": "preempted"}], "preempted"),
        ([{"event": "left", "outcome": "failed"}, {"event": "end", "status": "done"}], "failed"),
        ([{"event": "end"}], ""),
    ],
)
def test_the_word_of_the_supervisor_counts_first(rows: list[dict[str, str]], ended: str) -> None:
    assert how_it_ended(rows) == ended


def test_the_last_of_a_kind_and_the_last_reason() -> None:
    rows = [{"event": "end", "n": 1, "why": "a"}, {"event": "end", "n": 2}, {"event": "left", "why": ""}]
    assert last(rows, Kind.END) == rows[1] and last(rows, Kind.HANG) is None and why_it_ended(rows) == "a"
    assert why_it_ended([{"event": "save_skipped", "why": "busy"}]) == ""  # which is no reason of an end
    assert why_it_ended([{"event": "hang", "behind": {"text": "rank 3"}}]) == "rank 3"
    assert why_it_ended([{"event": "hang", "behind": 7}]) == ""
