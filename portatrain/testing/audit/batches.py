"""Compare the rows of batches by a word each: which rows they are, in which order, on which rank."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portatrain.testing.audit.leaves import flat, is_array, leaf_of
from portatrain.testing.audit.sums import bits, mixed

Fault = tuple[str, str, bool]
"""(kind, sentence, whether it is a fault and not a note)"""


def rows_of(batch: Any) -> dict[str, list[str]]:
    """Return a word for every row of every array of a batch, by the array's name.

    batch: a tree of arrays of which the first axis is the sample; an array without an axis is one row.
    """
    found = {}
    for path, value in flat(batch):
        if not is_array(value):
            continue
        leaf = leaf_of(value)
        array = leaf.boxes[0].fetch() if len(leaf.boxes) == 1 else np.asarray(value)
        rows = np.asarray(array, np.float64).reshape(array.shape[0] if array.ndim else 1, -1)
        weights = mixed(np.arange(rows.shape[1], dtype=np.uint64)) | np.uint64(1)
        words = (mixed(bits(rows)) * weights).sum(axis=1)
        found[".".join(path) or "batch"] = [f"{int(word):016x}" for word in words]
    return found


def joined(ranks: Sequence[Mapping[str, list[str]]]) -> dict[str, Any]:
    """Return the rows of all ranks, one after another, as JSON."""
    names = list(ranks[0])
    return {
        "arrays": {name: [row for rank in ranks for row in rank.get(name, [])] for name in names},
        "rank_rows": [max((len(rows) for rows in rank.values()), default=0) for rank in ranks],
    }


def _samples(batch: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return every sample as the words of its row in each array."""
    arrays = [rows for _, rows in sorted(batch["arrays"].items())]
    length = max((len(rows) for rows in arrays), default=0)
    return list(zip(*(rows for rows in arrays if len(rows) == length), strict=True))


def repeated(batch: Mapping[str, Any]) -> Fault | None:
    """Return the fault of a batch that has rows of one rank on another rank again."""
    samples, sizes = _samples(batch), batch["rank_rows"]
    if len(sizes) < 2 or sum(sizes) != len(samples):
        return None
    starts = np.cumsum([0, *sizes])
    parts = [samples[a:b] for a, b in itertools.pairwise(starts)]
    for first, part in enumerate(parts):
        for second in range(first + 1, len(parts)):
            same = set(part) & set(parts[second])
            if part and len(same) > len(set(part)) // 2:
                return (
                    "data-repeated",
                    f"ranks {first} and {second} have {len(same)} of {len(part)} rows in common",
                    True,
                )
    return None


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], around: Mapping[str, Mapping[str, Any]]
) -> Fault | None:
    """Return how the rows of `after` differ from those of `before`; None if they are the same.

    around: other batches of the run at the time of `before`, by their distance from it in steps.
    """
    if before["arrays"] == after["arrays"]:
        return None
    missing = sorted(set(before["arrays"]) ^ set(after["arrays"]))
    if missing:
        return "data", f"the arrays {', '.join(missing)} are in one of the two batches only", True
    old, new = _samples(before), _samples(after)
    if Counter(old) == Counter(new):
        return "data-order", "the same rows in another order", False
    for distance, batch in around.items():
        if set(_samples(batch)) & set(new) and set(new) <= set(_samples(batch)):
            return "data", f"the batch is the one {_steps(int(distance))}: the data is shifted by {distance}", True
    if len(old) != len(new):
        share = len(set(old) & set(new))
        return "data", f"{len(new)} rows, before {len(old)}; {share} are in both", True
    doubled = [row for row, times in Counter(new).items() if times > Counter(old)[row]]
    if set(new) < set(old):
        return "data", f"{len(doubled)} rows are there more than once, and {len(set(old) - set(new))} are missing", True
    for shift in range(1, len(old)):
        if old[shift:] == new[:-shift] or new[shift:] == old[:-shift]:
            sign = "+" if old[shift:] == new[:-shift] else "-"
            return "data", f"the rows are shifted by {sign}{shift} of {len(old)}", True
    wrong = [name for name, rows in before["arrays"].items() if rows != after["arrays"][name]]
    if len(wrong) < len(before["arrays"]):
        return "data", f"{', '.join(wrong)} differs, the other arrays are the same", True
    return "data", f"{len(set(old) & set(new))} of {len(new)} rows are the same", True


def _steps(distance: int) -> str:
    unit = "step" if abs(distance) == 1 else "steps"
    return f"{abs(distance)} {unit} {'later' if distance > 0 else 'earlier'}"
