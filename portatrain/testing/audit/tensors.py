"""Name what happened to a tensor between two records, from its sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Found = tuple[str, str]
"""(kind of fault, sentence)"""
SCALED = 1e-6
"""Two tensors are one times a factor if all their sums with random signs have this ratio, relative to the norm."""


def split(key: str) -> tuple[str, str]:
    """Return the role and the name of `ROLE/NAME`."""
    role, _, name = key.partition("/")
    return role, name


def same(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether two tensors have the same values in the same order."""
    return before["words"]["ordered"] == after["words"]["ordered"] and before["count"] == after["count"]


def constant(tensor: Mapping[str, Any]) -> bool:
    """Return whether all elements have one value; such tensors say nothing of which is which."""
    return tensor["low"] == tensor["high"] or tensor["count"] < 2


def distance(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return an estimate of the distance of two arrays, from their sums with random signs."""
    pairs = zip(before["signs"], after["signs"], strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(before["signs"]))


def factor(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """Return c if the later array is c times the earlier one; None if it is not, or if both are equal."""
    if not before["norm"] or not after["norm"]:
        return None
    biggest = max(before["signs"], key=abs)
    if not biggest:
        return None
    c = after["signs"][before["signs"].index(biggest)] / biggest
    room = SCALED * after["norm"]
    fits = all(abs(a - c * b) <= room for b, a in zip(before["signs"], after["signs"], strict=True))
    return c if fits and abs(c - 1.0) > 100 * SCALED and abs(abs(c) * before["norm"] - after["norm"]) <= room else None


def name_factor(c: float) -> str:
    """Return a factor as a person would write it: `4`, `1/4` or digits."""
    for value, text in ((c, "{}"), (1 / c, "1/{}")):
        if abs(value) >= 1 and abs(value - round(value)) <= 1e-3 * abs(value):
            return text.format(round(value)) if round(value) != 1 else f"{c:.6g}"
    return f"{c:.6g}"


def fault_of(key: str, before: Mapping[str, Any], after: Mapping[str, Any], earlier: Mapping[str, str]) -> Found | None:
    """Return what happened to a tensor; None if it has the same values, dtype and shape.

    Args:
        key: `ROLE/NAME`.
        before, after: its entry in each record.
        earlier: by the sum of a tensor of the earlier record, its key.
    """
    if after["bad"] and after["bad"] != before["bad"]:
        return "non-finite", f"{after['bad']} of {after['count']} elements are not finite"
    old, new = before["words"], after["words"]
    if same(before, after):
        return _same_values(before, after)
    slot = split(key)[0] not in ("params", "buffers")
    if not after["norm"] and not after["bad"]:
        return "zeroed", f"all zeros, its norm was {before['norm']:.6g}" + (": the moments are lost" if slot else "")
    if after["count"] != before["count"]:
        return "shape", f"the shape is {after['shape']}, it was {before['shape']}"
    other = earlier.get(new["ordered"])
    if other and other != key and not constant(after):
        return "swapped", f"it holds what {_spoken(other)} held"
    for kind, text in _as_whole(before, after, old, new):
        return kind, text
    changed = [i for i, (a, b) in enumerate(zip(before["blocks"], after["blocks"], strict=True)) if a != b]
    rows = before["shape"][0] if before["shape"] else 1
    used = {i * len(before["blocks"]) // rows for i in range(rows)} if rows < len(before["blocks"]) else None
    blocks = len(used) if used is not None else len(before["blocks"])
    far = distance(before, after) / before["norm"] if before["norm"] else math.inf
    place = ""
    if 0 < len(changed) < blocks:
        first, last = changed[0], changed[-1]
        low, high = first * rows // len(before["blocks"]), -(-(last + 1) * rows // len(before["blocks"]))
        place = f", in rows {low} to {high - 1} of {rows} only"
    return "changed", f"other values: about {far:.2g} of its norm away{place}"


def _same_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> Found | None:
    if before["dtype"] != after["dtype"]:
        return "dtype", f"the same values are stored as {after['dtype']}, they were {before['dtype']}"
    if before["shape"] != after["shape"]:
        return "reshaped", f"the same values in the shape {after['shape']}, it was {before['shape']}"
    return None


def _as_whole(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Mapping[str, str], new: Mapping[str, str]
) -> Iterator[Found]:
    """Yield what one operation on the whole tensor explains."""
    if len(before["shape"]) == 2 and new["ordered"] == old.get("transposed"):
        yield "transposed", "the transposed matrix"
    for dtype in ("bfloat16", "float16", "float32"):
        if dtype != before["dtype"] and new["ordered"] == old.get(dtype):
            stored = "" if after["dtype"] == before["dtype"] else f", and stored as {after['dtype']}"
            yield "rounded", f"the values were rounded to {dtype}{stored}"
    if new["size_ordered"] == old["size_ordered"]:
        every = all(a == -b for a, b in zip(before["signs"], after["signs"], strict=True))
        yield "sign", "the sign of every element is the other one" if every else "some signs are the other ones"
    if new["bag"] == old["bag"]:
        yield "permuted", "the same elements in another order"
    if new["size_bag"] == old["size_bag"]:
        yield "permuted", "the same magnitudes in another order, with other signs"
    if (c := factor(before, after)) is not None:
        yield "scaled", f"every element is {name_factor(c)} times what it was"


def _spoken(key: str) -> str:
    role, name = split(key)
    return name if role == "params" else f"{role} of {name}"
