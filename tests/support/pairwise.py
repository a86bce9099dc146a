"""Choose few rows of a table such that every pair of values of two columns stands in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def rows(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return every row of the table."""
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]


def cover(columns: Mapping[str, Sequence[Any]], width: int = 2) -> list[Row]:
    """Return rows in which every choice of values of `width` columns occurs.

    Each row is the one that adds the most new choices; of equal ones it is the first, so the result never changes.
    """
    every = rows(columns)
    parts = {id(row): set(itertools.combinations(sorted(row.items()), width)) for row in every}
    missing = set().union(*parts.values())
    found: list[Row] = []
    while missing:
        best = max(every, key=lambda row: len(parts[id(row)] & missing))
        missing -= parts[id(best)]
        found.append(best)
    return found


def diagonal(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return as many rows as the longest column has values, in which every value of every column occurs."""
    n = max(map(len, columns.values()))
    return [{name: values[(i + i // len(values)) % len(values)] for name, values in columns.items()} for i in range(n)]
