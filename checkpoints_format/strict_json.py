"""Strict JSON for untrusted files: sizes are checked before objects are made, and every field is read by name.

Duplicate keys, NaN, infinity, unbounded numbers and deep nesting are errors.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .errors import FormatError, shorten

MAX_OBJECTS, MAX_ITEMS, MAX_DEPTH = 1 << 20, 4 << 20, 32
RESTORE = "The checkpoint is damaged or was not written by this format: restore from another one."


def canonical(value: object) -> bytes:
    """Return the canonical JSON text of a value: no spaces, ASCII, keys in their order."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def parse(data: bytes, what: str, limit: int) -> object:
    """Parse JSON of at most ``limit`` bytes, after checking the number of lists and items.

    Raises:
        FormatError: it is too large, too deep or not valid; names ``what``.
    """
    if len(data) > limit:
        raise FormatError(what, expected=f"at most {limit} bytes", got=f"{len(data)}", do=RESTORE)
    objects, items = data.count(b"[") + data.count(b"{"), data.count(b",")
    if objects > MAX_OBJECTS or items > MAX_ITEMS:
        raise FormatError(
            what,
            expected=f"at most {MAX_OBJECTS} lists and {MAX_ITEMS} items",
            got=f"{objects} and {items}",
            do=RESTORE,
        )
    try:
        value = json.loads(
            data.decode("ascii"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (ValueError, RecursionError) as error:
        got = "JSON nested too deep" if isinstance(error, RecursionError) else str(error)[:120]
        raise FormatError(what, expected="JSON", got=got, do=RESTORE) from None
    if _deeper_than(value, MAX_DEPTH):
        raise FormatError(what, expected=f"JSON at most {MAX_DEPTH} deep", got="deeper", do=RESTORE)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object with a duplicate key")
    return fields


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"the constant {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number beyond float64")
    return value


def _bounded(text: str) -> int:
    if len(text) > 40:
        raise ValueError("a whole number of more than 40 digits")
    return int(text)


def _deeper_than(value: object, depth: int) -> bool:
    level: list[Any] = [value]
    while level and depth >= 0:
        containers = [v for v in level if isinstance(v, dict | list)]
        level = [
            v for c in containers for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, dict | list)
        ]
        depth -= 1
    return bool(level)


class Fields:
    """A JSON object of which the caller takes every field once, by name and type. Fields that are left are an error."""

    def __init__(self, value: object, what: str) -> None:
        self.what = what
        if not isinstance(value, dict):
            raise FormatError(what, expected="a JSON object", got=shorten(value), do=RESTORE)
        self.all, self.left = value, dict(value)

    def take(self, key: str, kind: type) -> Any:
        if key not in self.left:
            raise FormatError(self.what, expected=f"a field {key!r}", got="none", do=RESTORE)
        value = self.left.pop(key)
        if type(value) is not kind:  # bool is not int here
            raise FormatError(f"{self.what}, {key}", expected=kind.__name__, got=shorten(value), do=RESTORE)
        return value

    def list(self, key: str) -> list[Any]:
        return self.take(key, list)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.take(key, int)
        if not low <= value <= high:
            raise FormatError(f"{self.what}, {key}", expected=f"{low} to {high}", got=shorten(value), do=RESTORE)
        return value

    def match(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.take(key, str)
        if not pattern.fullmatch(value):
            raise FormatError(
                f"{self.what}, {key}", expected=f"text like {pattern.pattern}", got=shorten(value), do=RESTORE
            )
        return value

    def equal(self, key: str, expected: str) -> None:
        value = self.take(key, str)
        if value != expected:
            raise FormatError(f"{self.what}, {key}", expected=repr(expected), got=shorten(value), do=RESTORE)

    def done(self) -> None:
        if self.left:
            raise FormatError(self.what, expected="no further field", got=shorten(next(iter(self.left))), do=RESTORE)


def same_text(value: Fields, data: bytes) -> None:
    """Raise FormatError unless ``data`` is the canonical text of the values, so that every bit of it matters."""

    if canonical(value.all) != data:
        raise FormatError(value.what, expected="JSON in its canonical spelling", got="another spelling", do=RESTORE)
