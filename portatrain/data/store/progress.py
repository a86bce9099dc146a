"""Say how far a long piece of work is, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable

from portatrain.system.text import counted

EVERY_S = 2.0


class Progress:
    """Documents [first, total) of a split. `tell` is called with a line, at most every EVERY_S seconds."""

    def __init__(self, split: str, total: int, first: int, tell: Callable[[str], None]) -> None:
        self._split, self._total, self._first, self._tell = split, total, first, tell
        self._began_s = self._told_s = time.monotonic()
        self._bytes, self._said = 0, False
        if first:
            tell(f"{split}: going on at document {first:,} of {total:,}")

    def at(self, number: int, tokens: int, group_bytes: int, *, whole: bool = False) -> None:
        """Note that documents below `number` are tokenised, and `tokens` tokens written.

        group_bytes: the bytes of the group that is at work; `whole`: it is done.
        """
        so_far = self._bytes + group_bytes
        if whole:
            self._bytes = so_far
        now_s = time.monotonic()
        if now_s < self._told_s + EVERY_S:
            return
        self._told_s, self._said = now_s, True
        past_s = now_s - self._began_s
        left_s = past_s * (self._total - number) / max(1, number - self._first)
        self._tell(
            f"{self._split}: {number:,} of {counted(self._total, 'documents')} ({100 * number / self._total:.1f} %), "
            f"{counted(tokens, 'tokens')}, {so_far / past_s / 1e6:.1f} MB/s, {duration(left_s)} left"
        )

    def end(self, tokens: int) -> None:
        if self._said:
            past_s = time.monotonic() - self._began_s
            self._tell(
                f"{self._split}: {counted(self._total, 'documents')}, {counted(tokens, 'tokens')}, "
                f"in {duration(past_s)}"
            )


def duration(seconds: float) -> str:
    """Return a time in words, such as '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
