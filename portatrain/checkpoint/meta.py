"""Check the meta of a run's checkpoint, field by field, before anything is computed from it.

A checksum covers the meta in a checkpoint, but not the copy in an export, which is a text file. Whoever reads a meta
can rely on the types that are listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portatrain.checkpoint.begun import BEGAN, IMPORTED
from portatrain.system import json_files

MOST = 10**12
"""The largest valid number of steps."""
NEEDED = ("step", "recipe", "recipe_sha256")
"""The fields that the meta of a run's checkpoint always has."""

Check = Callable[[Any], bool]


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _number(value: Any) -> bool:
    try:
        json_files.number(value)
    except ValueError:
        return False
    return True


def _numbers(value: Any) -> bool:
    """True for a number, and for lists of them of one shape."""
    if not isinstance(value, list):
        return _number(value)
    return all(map(_numbers, value)) and len({len(v) if isinstance(v, list) else -1 for v in value}) <= 1


def _rows(width: int) -> Check:
    """Return a check for a list of rows [step, number, ...] of `width` entries."""

    def rows(value: Any) -> bool:
        good = isinstance(value, list) and all(isinstance(row, list) and len(row) == width for row in value)
        return good and all(_count(row[0]) and all(map(_number, row[1:])) for row in value)

    return rows


def _recipe(value: Any) -> bool:
    return _object(value) and _text(value.get("class"))


def _data(value: Any) -> bool:
    return _object(value) and all(v is None or isinstance(v, (str, int)) for v in value.values())


def _probe(value: Any) -> bool:
    if value is None:
        return True
    if not _object(value) or not isinstance(value.get("losses"), list) or not _object(value.get("norms")):
        return False
    return bool(value["losses"]) and all(map(_number, value["losses"])) and all(map(_numbers, value["norms"].values()))


def _fingerprints(value: Any) -> bool:
    tensors = value.get("tensors") if _object(value) else None
    if not isinstance(tensors, Mapping):
        return False
    return _text(value.get("algorithm")) and all(map(_text, tensors.values()))


FIELDS: Mapping[str, tuple[Check, str]] = {
    "step": (_count, f"a whole number from 0 to {MOST}"),
    "applied": (_count, f"a whole number from 0 to {MOST}"),
    "data": (_data, "an object of texts and whole numbers"),
    "rng": (_object, "an object"),
    "schedule": (_object, "an object"),
    "probe": (_probe, "an object with losses and norms"),
    "recipe": (_recipe, "an object that names its class"),
    "recipe_sha256": (_text, "a text"),
    "history": (_rows(2), "a list of [step, loss]"),
    "spikes": (_rows(3), "a list of [step, loss, norm]"),
    "metrics": (_object, "an object"),
    "surgery": (_object, "an object"),
    "fingerprints": (_fingerprints, "an algorithm and a text for each tensor"),
    IMPORTED: (_object, "an object"),
    BEGAN: (_object, "an object"),
}
"""Field -> (check, what it expects). A field that is not there is right, unless it is in NEEDED."""


def wrong(meta: Mapping[str, Any], needed: tuple[str, ...] = ()) -> tuple[str, str, str] | None:
    """Return (field, what is expected, what is there) for the first field of another type; None if all are right."""
    for name, (check, expected) in FIELDS.items():
        if name in meta and not check(meta[name]):
            return name, expected, f"{meta[name]!r:.60}"
        if name not in meta and name in needed:
            return name, expected, "no such field"
    return None
