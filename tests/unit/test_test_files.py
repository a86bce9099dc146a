"""What a file of tests may import: helpers of tests/support or of its own folder by their full name, never tests.

And no file turns the formatter off."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
OTHERS = sorted(
    path.relative_to(ROOT)
    for package in ("benchmarks", "examples", "portatrain", "launchers", "recipes", "checkpoints_format")
    for path in (ROOT / package).rglob("*.py")
)
SELF = Path(__file__).name
# Recipe files and packages that a test copies into a folder of its own, where they import their neighbours.
COPIED = {"pace", "acme_chip"}
HELPERS = {path.stem for path in TESTS if not path.stem.startswith(("test_", "__"))} - COPIED


def test_no_two_files_have_one_name() -> None:
    """pytest imports a file by its name alone, and cannot import another file of that name."""
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def imported(source: str) -> set[str]:
    """Return the full names of the modules that ``source`` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def mistakes(source: str) -> list[str]:
    """Return the imports that a file below tests/ must not have."""
    return sorted(
        name
        for name in imported(source)
        if name.rpartition(".")[2].startswith("test_")  # another file of tests
        or name in HELPERS  # a helper under a second name: it would be loaded twice
        or name.startswith("tests.conftest")
    )


def test_ruff_formats_every_line() -> None:
    off = re.compile(r"#\s*fmt:\s*(off|skip)")
    assert off.search("x = [1,2]  # fmt: skip")
    assert not [path for path in (*TESTS, *OTHERS) if off.search((ROOT / path).read_text()) and path.name != SELF]


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_no_file_of_tests_is_imported_and_every_helper_has_one_name(path: Path) -> None:
    assert not mistakes((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "planted",
    [
        "from tests.unit.test_recipe import GOOD",
        "from test_data_windows import windows",
        "def f():\n    import tests.golden.test_jobs",
        "from tests.golden import test_jobs",
        "from running import BACKENDS",
        "from tests.conftest import unchanged",
    ],
)
def test_a_planted_import_is_seen(planted: str) -> None:
    assert mistakes(planted)


def test_nothing_outside_tests_imports_tests() -> None:
    found = {
        str(path): name
        for path in OTHERS
        for name in imported((ROOT / path).read_text(encoding="utf-8"))
        if name.partition(".")[0] == "tests"
    }
    assert found == {}
