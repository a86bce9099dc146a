"""Numbers of samples that a recipe leaves out, and the sample at each place of the sequence without them.

``51`` is sample 51; ``51:54`` are samples 51, 52 and 53, as in a slice of Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from portatrain.errors import UserError

Ranges = tuple[tuple[int, int], ...]
"""Ranges [first, end) of numbers, in order; no two of them touch."""


def ranges(words: Iterable[str], what: str) -> Ranges:
    """Return the numbers that `words` name. Raises UserError, about `what`, for a word that names none."""
    found = []
    for word in words:
        match = re.fullmatch(r"([0-9]{1,15})(?::([0-9]{1,15}))?", word.strip())
        first = int(match[1]) if match else 0
        end = int(match[2]) if match and match[2] else first + 1
        if match is None or end <= first:
            raise UserError(
                f"{what} {word}",
                expected="the number of a sample, such as 51, or N1:N2 for samples N1 to N2 - 1",
                got="no sample" if match else repr(word),
                do="Sample numbers count from 0; 51:54 are samples 51, 52 and 53.",
            )
        found.append((first, end))
    return merged(found)


def merged(found: Iterable[tuple[int, int]]) -> Ranges:
    """Return the same numbers as ranges in order, of which no two touch."""
    out: list[tuple[int, int]] = []
    for first, end in sorted(found):
        if out and first <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((first, end))
    return tuple(out)


def below(left_out: Ranges, end: int) -> Ranges:
    """Return those of the numbers that are below `end`."""
    return tuple((a, min(b, end)) for a, b in left_out if a < end)


def number_at(position: int, left_out: Ranges) -> int:
    """Return the number of the sample at `position`, from 0, of the sequence without those that are left out."""
    for first, end in left_out:
        if position < first:
            break
        position += end - first
    return position


def runs_of(position: int, count: int, left_out: Ranges) -> list[tuple[int, int]]:
    """Return the numbers of the samples at positions [position, position + count) as runs (first number, count)."""
    first = number_at(position, left_out)
    out = []
    for a, b in left_out:
        if count and first < a:
            here = min(count, a - first)
            out.append((first, here))
            count -= here
            first = b if first + here == a else first + here
    return [*out, (first, count)] if count or not out else out


def in_words(left_out: Sequence[tuple[int, int]]) -> list[str]:
    """Return the words that name these numbers."""
    return [f"{a}" if b == a + 1 else f"{a}:{b}" for a, b in left_out]
