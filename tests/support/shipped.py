"""The recipes that portatrain ships, as parameters of tests: the small ones, a decoder and two mixtures in the tests of
every change, and the others, which have a family's own layers, in the long ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from portatrain.recipe import shipped_recipes

USUAL = ("llama3-8b", "deepseek-v3", "gpt-oss-20b")


def each(names: Iterable[str] | None = None) -> list[Any]:
    """Return `names` (default: all shipped recipes) with the mark `full` on those of released models but `USUAL`."""
    shipped = shipped_recipes()
    return [
        pytest.param(name, marks=pytest.mark.full if long(name, shipped) else ())
        for name in (shipped if names is None else names)
    ]


def long(name: str, shipped: Iterable[str]) -> bool:
    return name in shipped and not name.startswith("tiny-") and name not in USUAL
