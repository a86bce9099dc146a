"""The order in which several workers take the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import schedule

ROOT = Path(__file__).parents[2]
MATRIX = "tests/distributed/test_matrix.py"


def test_a_part_is_a_file_or_one_of_its_parts() -> None:
    assert schedule.part("tests/unit/test_a.py::test_b[c]") == "tests/unit/test_a.py"
    cell = f"{MATRIX}::test_a_cell[jax, 2 processes | fsdp=4 | tiny-lm]"
    assert schedule.part(cell) == f"{MATRIX}::jax, 2 processes"
    assert schedule.part(f"{MATRIX}::test_the_table") == MATRIX


def test_the_longest_part_is_first_and_each_stays_together() -> None:
    whole = [name for name in schedule.SECONDS if "::" not in name]
    longest = max(whole, key=schedule.SECONDS.__getitem__)
    names = ["tests/a.py::x", "tests/b.py::x", f"{longest}::x", "tests/a.py::y", "tests/b.py::y", "tests/b.py::z"]
    items: list[Any] = [Item(name) for name in names]
    schedule.sort(items)
    assert [item.nodeid for item in items] == [names[2], names[1], names[4], names[5], names[0], names[3]]


class Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_every_file_that_is_named_exists() -> None:
    assert all((ROOT / name.partition("::")[0]).is_file() for name in {*schedule.SECONDS, *schedule.PARTS})


def test_xdist_takes_this_scheduler(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setattr(pytestconfig.option, "tx", ["popen", "popen"])
    monkeypatch.setattr(pytestconfig.option, "loadscopereorder", True)
    made = pytestconfig.hook.pytest_xdist_make_scheduler(config=pytestconfig, log=None)
    made = made[0] if isinstance(made, list) else made
    assert made.numnodes == 2 and not pytestconfig.option.loadscopereorder  # it would put the parts in another order
    assert made._split_scope("tests/unit/test_a.py::test_b[c]") == "tests/unit/test_a.py"
