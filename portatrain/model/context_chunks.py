"""Which positions of a sequence each share of the mesh axis `context` attends for, and how much work that is.

Values hold the positions in order: of n shares, share r has the r-th n-th of them. Under a causal mask a later query
sees more keys, so the last share would have up to twice the mean. So attention cuts the sequence into 2n chunks. Share
r has the chunks 2r and 2r+1; it keeps the first and exchanges the second with share n-1-r. It then has the chunks 2r
and 2n-1-2r, whose numbers add up to 2n-1 on every share, and so do the keys that they see. Half of the queries move, to
one other device; only attention knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

GAIN = 0.05
"""Queries are exchanged if the busiest share then has less to do by at least this part."""
Chunks = tuple[tuple[int, int], ...]
"""(first position, length) of each run of positions that a share attends for, in the order in which it has them."""


def in_order(shares: int, length: int) -> tuple[Chunks, ...]:
    """Return the chunk of every share of `length` positions, without an exchange."""
    each = length // shares
    return tuple(((share * each, each),) for share in range(shares))


def exchanged(shares: int, length: int) -> tuple[Chunks, ...]:
    """Return the chunks of every share after the exchange. 2 x `shares` must divide `length`."""
    each = length // (2 * shares)
    return tuple(((2 * share * each, each), ((2 * shares - 1 - 2 * share) * each, each)) for share in range(shares))


def dealt(shares: int, length: int, *, causal: bool, window: int | None) -> tuple[Chunks, ...]:
    """Return the chunks of every share for a mask by position: after the exchange if that is worth it (`GAIN`) and the
    chunks are equal, else in order."""
    plain = in_order(shares, length)
    if shares == 1 or length % (2 * shares):
        return plain
    dealt = exchanged(shares, length)
    before, after = (max(pairs(c, length, causal=causal, window=window) for c in each) for each in (plain, dealt))
    return dealt if after <= (1 - GAIN) * before else plain


def keys_of(chunk: tuple[int, int], length: int, *, causal: bool, window: int | None) -> tuple[int, int]:
    """Return (first, end) of the keys that some query of a chunk sees, by position."""
    start, end = chunk[0], sum(chunk)
    first = 0 if window is None else max(0, start - window + 1)
    if causal:
        return first, end
    return first, length if window is None else min(length, end + window - 1)


def pairs(chunks: Chunks, length: int, *, causal: bool, window: int | None) -> int:
    """Return the number of pairs of a query in `chunks` and a key that it sees, by position."""
    return sum(
        _pairs_below(start + size, length, causal, window) - _pairs_below(start, length, causal, window)
        for start, size in chunks
    )


def _pairs_below(end: int, length: int, causal: bool, window: int | None) -> int:
    """Return the number of pairs of the queries 0 to end - 1."""
    window = length if window is None else min(window, length)
    hidden = _triangle(max(end - window, 0))  # of query i, the keys up to i - window
    if causal:
        return _triangle(end) - hidden
    near = min(end, length - window + 1)  # the queries that do not reach past the end
    return near * (window - 1) + _triangle(near) + (end - near) * length - hidden


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def computed(chunks: Chunks, length: int, *, causal: bool, window: int | None) -> int:
    """Return the number of pairs that a kernel computes if it leaves out only the keys that no query of a chunk
    sees."""
    found = 0
    for chunk in chunks:
        first, end = keys_of(chunk, length, causal=causal, window=window)
        found += chunk[1] * (end - first)
    return found


def imbalance(work: Sequence[float]) -> float:
    """Return the work of the busiest share over the mean."""
    return max(work) * len(work) / sum(work)
