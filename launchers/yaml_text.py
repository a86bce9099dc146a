"""Write plain data as YAML, for people and schedulers, without a YAML package. A string is quoted if YAML might read it
as another type."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def to_yaml(data: Any) -> str:
    """Return `data` (mappings, sequences, text, numbers, booleans, None) as a YAML document."""
    return "\n".join(_lines(data)) + "\n"


def _lines(data: Any) -> list[str]:
    if isinstance(data, Mapping) and data:
        found = []
        for key, value in data.items():
            found += _entry(f"{_scalar(str(key))}:", value)
        return found
    if isinstance(data, Sequence) and not isinstance(data, str) and data:
        found = []
        for value in data:
            first, *rest = _block(value) if isinstance(value, str) and "\n" in value else _lines(value)
            found += [f"- {first}", *(f"  {line}" for line in rest)]
        return found
    return [_scalar(data)]


def _entry(key: str, value: Any) -> list[str]:
    if isinstance(value, str) and "\n" in value:
        first, *rest = _block(value)
        return [f"{key} {first}", *(f"  {line}" for line in rest)]
    lines = _lines(value)
    nested = isinstance(value, (Mapping, Sequence)) and not isinstance(value, str) and len(value)
    return [key, *(f"  {line}" for line in lines)] if nested else [f"{key} {lines[0]}"]


def _block(text: str) -> list[str]:
    """Return a literal block with unchanged lines, or quoted text if a block cannot represent it exactly."""
    body = text.removesuffix("\n")
    if (
        body[:1] in ("", " ", "\t", "\n")
        or body.endswith("\n")
        or not all(line.isprintable() for line in body.split("\n"))
    ):
        return [_quoted(text)]
    return ["|" if text.endswith("\n") else "|-", *body.split("\n")]


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, Mapping):
        return "{}"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """Return `text` in double quotes. JSON's pairs of surrogates, for characters beyond 16 bits, mean two characters in
    YAML, so such characters are written with eight digits."""
    return (
        "".join(c if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))
        if (text.isprintable())
        else '"' + "".join(_escape(c) for c in text) + '"'
    )


def _escape(c: str) -> str:
    return json.dumps(c)[1:-1] if ord(c) < 0x10000 and c != "\x7f" else f"\\U{ord(c):08x}"
