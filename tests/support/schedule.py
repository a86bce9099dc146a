"""In which order several workers take the tests: the files that take longest first, and the longest of them in parts.

xdist gives a worker one part after another. A part is a file, as its fixtures are shared, except those of `PARTS`.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

PARTS = {
    "tests/contract/test_kernel_court.py": r"::(\w+)",  # a test function
    "tests/distributed/test_matrix.py": r"\[([^|]*) \|",  # a backend
}
"""The files that are cut into parts, and the expression for a part in the id of a test."""

SECONDS = {
    "tests/distributed/test_matrix.py::torch, compiled": 400,
    "tests/distributed/test_matrix.py::jax, 2 processes": 250,
    "tests/contract/test_remat.py": 200,
    "tests/contract/test_splash.py": 180,
    "tests/distributed/test_matrix.py::jax": 170,
    "tests/distributed/test_matrix.py::deepspeed-3": 160,
    "tests/distributed/test_matrix.py::deepspeed-2": 150,
    "tests/distributed/test_matrix.py::deepspeed-1": 150,
    "tests/contract/test_ops.py": 140,
    "tests/contract/test_recipe_check.py": 130,
    "tests/contract/test_models.py": 120,
    "tests/docs/test_code_blocks.py": 100,
    "tests/distributed/test_matrix.py::torch": 90,
    "tests/contract/test_damaged_records.py": 90,
    "tests/contract/test_attention_chunks.py": 80,
    "tests/contract/test_parity.py": 80,
    "tests/contract/test_low_precision.py": 70,
    "tests/contract/test_rounding.py": 70,
    "tests/unit/test_init.py": 65,
    "tests/contract/test_non_finite.py": 60,
    "tests/contract/test_continuity.py": 60,
    "tests/faults/test_signals.py": 55,
    "tests/contract/test_save_by_time.py": 50,
    "tests/unit/test_unseen_recipes.py": 45,
    "tests/contract/test_resume.py": 40,
    "tests/contract/test_plugin_recipes.py": 40,
    "tests/contract/test_plugins.py": 30,
    "tests/contract/test_export_own_model.py": 25,
    "tests/contract/test_first_hour.py": 25,
}
"""CPU seconds, roughly, of the parts that take longer than their numbers of tests say."""
EACH_S = 0.3
"""What a test takes, for the parts that are not in `SECONDS`."""


def part(nodeid: str) -> str:
    """Return the part that a test belongs to."""
    file = nodeid.partition("::")[0]
    found = re.search(PARTS[file], nodeid) if file in PARTS else None
    return f"{file}::{found[1]}" if found else file


def sort(items: list[pytest.Item]) -> None:
    """Put the parts in the order of their length; the tests of a part stay in theirs."""
    parts = {item: part(item.nodeid) for item in items}
    tests = Counter(parts.values())
    length = {name: SECONDS.get(name, EACH_S * count) for name, count in tests.items()}
    items.sort(key=lambda item: (-length[parts[item]], parts[item]))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return xdist's scheduler that gives workers whole parts, in the order of the tests."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part(nodeid)

    config.option.loadscopereorder = False
    return Parts(config, log)
