"""`LeftOut`: the sequence of samples of a split without some of them; those that follow move up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from portatrain.data.ranges import Ranges, runs_of
from portatrain.data.split import Batch, Split


class LeftOut(Split):
    """The samples of `whole` without the numbers `left_out`.

    `batch(start, count)` counts places of this sequence. A sample keeps its number, which is in ``sample``, so dropout
    draws for it what it draws in the whole sequence. Its fingerprint is that of the whole split: like a seed,
    `left_out` says in which order windows come, and not what they are.
    """

    def __init__(self, whole: Split, left_out: Ranges) -> None:
        self.whole, self.left_out = whole, left_out
        self.name, self.windows, self.fingerprint = whole.name, whole.windows, whole.fingerprint
        self.bytes_per_target, self.groups = whole.bytes_per_target, whole.groups

    def batch(self, start: int, count: int) -> Batch:
        return _joined([self.whole.batch(*run) for run in runs_of(start, count, self.left_out)])

    def part(self, start: int, count: int, rows: np.ndarray) -> Batch:
        parts, at = [], 0
        for first, here in runs_of(start, count, self.left_out):
            parts.append(self.whole.part(first, here, rows[at : at + here]))
            at += here
        return _joined(parts)

    def ahead(self, start: int, count: int, rows: np.ndarray | None) -> None:
        at = 0
        for first, here in runs_of(start, count, self.left_out):
            self.whole.ahead(first, here, None if rows is None else rows[at : at + here])
            at += here

    def blank(self, count: int) -> Batch:
        return self.whole.blank(count)

    def check_end(self, end: int) -> None:
        self.whole.check_end(end)

    def once(self, count: int) -> Iterator[Batch]:
        return self.whole.once(count)


def _joined(parts: list[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
