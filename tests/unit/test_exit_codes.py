"""The exit codes have one home."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.system import exit_codes

ROOT = Path(__file__).parents[2]
CODES = {exit_codes.MISTAKE, exit_codes.STORAGE, exit_codes.RESUMABLE, exit_codes.INTERRUPTED}
FILES = [p for folder in ("portatrain", "launchers") for p in sorted((ROOT / folder).rglob("*.py"))]


def literals(tree: ast.AST) -> Iterator[int]:
    """Lines on which one of the codes is written as a number: returned, compared, or handed to an exit."""
    for node in ast.walk(tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Return):
            values = [node.value]
        elif isinstance(node, ast.Compare):
            named = "code" in ast.unparse(node).lower() or "rc" in ast.unparse(node)
            values = [node.left, *node.comparators] if named else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("exit"):
            values = list(node.args)
        for one in values:
            for inner in ast.walk(one) if one is not None else ():
                large = CODES - {exit_codes.MISTAKE}
                whole = inner is one and not isinstance(node, ast.Return)
                value = inner.value if isinstance(inner, ast.Constant) and type(inner.value) is int else None
                if value in large or (whole and value in CODES):
                    yield inner.lineno


def test_the_codes_are_what_schedulers_and_docs_know() -> None:
    assert (exit_codes.OK, exit_codes.MISTAKE, exit_codes.STORAGE) == (0, 2, 75)
    assert (exit_codes.RESUMABLE, exit_codes.INTERRUPTED) == (85, 130)
    assert exit_codes.NOT_FAILURES == (0, 85, 130)


def test_no_file_but_the_table_writes_a_code_as_a_number() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        if path.name != "exit_codes.py"
        for line in literals(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize("text", ["if code in (85, 130): pass", "return_code == 75", "sys.exit(2)", "os._exit(85)"])
def test_a_planted_literal_is_found(text: str) -> None:
    assert list(literals(ast.parse(text)))
