"""The fields in which the recipes of several runs differ, as --set would change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Owners = tuple[str | None, ...]


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return, for each recipe as JSON, the fields that are not the same in all of them: dotted path -> value.

    A field differs from that of another recipe only if the objects that have it are of one class.
    """
    flat = [dict(_fields(recipe)) for recipe in recipes]
    varying = _varying(flat)
    return [{path: value for path, value in mine.items() if (path, _owners(path, mine)) in varying} for mine in flat]


def _varying(group: list[dict[str, str]]) -> set[tuple[str, Owners]]:
    """Return the fields, each with its owners, that have several values in the runs of a group."""
    found: dict[tuple[str, Owners], set[str | None]] = {}
    for path in {path: None for mine in group for path in mine}:
        for mine in group:
            found.setdefault((path, _owners(path, mine)), set()).add(mine.get(path))
    return {at for at, values in found.items() if len(values) > 1}


def _owners(path: str, mine: Mapping[str, str]) -> Owners:
    """Return the classes of the objects that have a field, from the outermost in; None for what is no object."""
    parts = path.split(".")
    return tuple(mine.get(".".join(parts[:depth])) for depth in range(1, len(parts)))


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every field of a recipe's JSON, as --set takes them; a class is the value of its path."""
    if not isinstance(value, Mapping):
        yield path, as_text(value)
        return
    if "class" in value and path:
        yield path, str(value["class"]).rpartition(":")[2]
    for name, inner in value.items():
        if name != "class":
            yield from _fields(inner, f"{path}.{name}" if path else name)


def as_text(value: Any) -> str:
    """Return a value of a recipe's JSON as short text, from which --set reads the same value."""
    if isinstance(value, list):
        return ",".join(map(as_text, value)) or "()"
    if isinstance(value, Mapping):
        return str(value.get("class", value)).rpartition(":")[2]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
