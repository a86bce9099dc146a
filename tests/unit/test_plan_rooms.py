"""The order inside plan: clusters, cost, the modules of the room itself, compilers. No import points up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ("clusters", "cost", "", "compilers")
"""Low to high; '' stands for the modules of plan itself, such as search and result."""
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "portatrain" / "plan").rglob("*.py"))


def level(module: str) -> int | None:
    """Return the place in ORDER of a module of plan, by its full name; None for a module outside plan."""
    if not f"{module}.".startswith("portatrain.plan."):
        return None
    part = module.removeprefix("portatrain.plan").lstrip(".").partition(".")[0]
    return ORDER.index(part if part in ORDER else "")


def upward(source: str, module: str) -> list[str]:
    """Return the imports of ``source``, the text of ``module``, that point to a higher part of plan."""
    here = level(module)
    assert here is not None
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "plan imports by full names"
            # `from portatrain.plan import search` names the module in the alias.
            package = node.module == "portatrain.plan"
            names = [f"{node.module}.{alias.name}" if package else str(node.module) for alias in node.names]
        else:
            continue
        found += [name for name in names if (level(name) or 0) > here]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_import_inside_plan_points_up(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    assert upward((ROOT / path).read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "planted"),
    [
        ("portatrain.plan.clusters.names", "from portatrain.plan.cost.policy import REMATS"),
        ("portatrain.plan.cost.memory", "def f():\n    from portatrain.plan import search"),
        ("portatrain.plan.recorded", "from portatrain.plan.compilers.gpus import description"),
        ("portatrain.plan.clusters.cluster", "import portatrain.plan.result"),
    ],
)
def test_a_planted_import_is_seen(module: str, planted: str) -> None:
    assert upward(planted, module)
    assert not upward(planted, "portatrain.plan.compilers.job")
