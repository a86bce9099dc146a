"""The rooms of the house: an import never points to a room above, and no files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From low to high. A room imports only what stands before it; `launchers` is a package beside `portatrain`.
ORDER = (
    *("errors", "config", "system", "model", "optim", "data", "recipe", "backends", "checkpoint", "runs", "plan"),
    *("training", "testing", "launchers", "commands", "cli"),
)
# The one exception: the entry point of a job's process goes on as the entry point of the command line.
ALLOWED = {("launchers/rank_entry.py", "portatrain.cli")}
FRAMEWORKS = ("jax", "jaxlib", "flax", "optax", "torch", "deepspeed", "torch_xla", "orbax")
FRAMEWORK_FILES = ("portatrain/backends/", "portatrain/checkpoint/interop/", "portatrain/plan/compilers/")


def python_files(root: Path, *packages: str) -> dict[str, str]:
    """The source of every module below `packages`, by its path from `root`."""
    files = [file for package in packages for file in sorted((root / package).rglob("*.py"))]
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those in functions and for type checkers too: a hidden circle is one."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def room(dotted: str) -> str | None:
    """The room of a module or of a name in it; None outside the rooms (another package, `portatrain` itself)."""
    parts = dotted.split(".")
    if parts[0] == "launchers":
        return "launchers"
    return parts[1] if parts[0] == "portatrain" and len(parts) > 1 and parts[1] in ORDER else None


def upward(files: Mapping[str, str]) -> list[str]:
    """Every import of a higher room that is not allowed, with its file and line."""
    found = []
    for path, source in files.items():
        here = room(path.removesuffix(".py").replace("/", "."))
        for line, name in imports(path, source):
            there = room(name)
            if here is None or there is None or ORDER.index(there) <= ORDER.index(here):
                continue
            if not any(path == file and name.startswith(target) for file, target in ALLOWED):
                found.append(f"{path}:{line} imports {name}")
    return found


def circles(files: Mapping[str, str]) -> list[list[str]]:
    """Groups of files that import each other in a circle (Tarjan's strongly connected components)."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}

    def target(name: str) -> str | None:
        return modules.get(name) or modules.get(name.rpartition(".")[0])

    edges = {
        path: sorted({to for _, name in imports(path, source) if (to := target(name)) and to != path})
        for path, source in files.items()
        if not path.endswith("__init__.py")  # an __init__ only hands names on
    }
    return [sorted(group) for group in strongly_connected(edges) if len(group) > 1]


def strongly_connected(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for to in edges.get(node, ()):
            if to not in index:
                visit(to)
                low[node] = min(low[node], low[to])
            elif to in stack:
                low[node] = min(low[node], index[to])
        if low[node] == index[node]:
            at = stack.index(node)
            groups.append(stack[at:])
            del stack[at:]

    for node in edges:
        if node not in index:
            visit(node)
    return groups


FILES = python_files(ROOT, "portatrain", "launchers", "checkpoints_format", "recipes")


def test_every_module_has_a_room() -> None:
    """A new folder of portatrain/ gets its place in ORDER before anything is put into it."""
    inside = {path.split("/")[1].removesuffix(".py") for path in FILES if path.startswith("portatrain/")}
    assert inside - {"__init__", "__main__"} <= set(ORDER)


def test_no_import_points_up() -> None:
    assert upward(FILES) == []


def test_no_circle() -> None:
    assert circles(FILES) == []


def test_the_format_stands_alone() -> None:
    names = {
        f"{path}:{line} imports {name}"
        for path, source in FILES.items()
        if path.startswith("checkpoints_format/")
        for line, name in imports(path, source)
        if name.partition(".")[0] in ("portatrain", "launchers", "recipes")
    }
    assert names == set()


def test_frameworks_stay_in_their_rooms() -> None:
    found = [
        f"{path}:{line} imports {name}"
        for path, source in FILES.items()
        if not path.startswith(FRAMEWORK_FILES)
        for line, name in imports(path, source)
        if name.partition(".")[0] in FRAMEWORKS
    ]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        {"portatrain/model/low.py": "from portatrain.training.trainer import train"},
        {"portatrain/runs/low.py": "def f():\n    import launchers.base"},
        {"launchers/low.py": "from portatrain.commands import submit"},
        {
            "portatrain/checkpoint/low.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import portatrain.cli"
        },
    ],
    ids=["plain", "in a function", "launchers", "for types"],
)
def test_an_import_that_points_up_is_found(planted: dict[str, str]) -> None:
    assert len(upward(planted)) == 1


@pytest.mark.parametrize(
    "planted",
    [
        {
            "portatrain/data/a.py": "from portatrain.data import b",
            "portatrain/data/b.py": "from portatrain.data.a import x",
        },
        {"checkpoints_format/a.py": "from .b import x", "checkpoints_format/b.py": "from . import a"},
        {
            "portatrain/data/a.py": "import portatrain.data.b",
            "portatrain/data/b.py": "import portatrain.data.c",
            "portatrain/data/c.py": "def f():\n    from portatrain.data.a import x",
        },
    ],
    ids=["two", "relative", "three, one in a function"],
)
def test_a_circle_is_found(planted: dict[str, str]) -> None:
    assert circles(planted) == [sorted(planted)]
