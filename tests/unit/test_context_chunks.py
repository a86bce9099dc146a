"""The shares of the mesh axis context: every position once, work counted pair by pair, and equal shares of it."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.model.context_chunks import computed, dealt, exchanged, imbalance, in_order, keys_of, pairs

RULES = [(True, None), (True, 1), (True, 5), (True, 13), (True, 99), (False, None), (False, 1), (False, 4), (False, 99)]


def seen(length: int, causal: bool, window: int | None) -> np.ndarray:
    behind = np.arange(length)[:, None] - np.arange(length)[None, :]
    there = behind >= 0 if causal else np.ones_like(behind, bool)
    return there if window is None else there & (abs(behind) < window)


@pytest.mark.parametrize(("causal", "window"), RULES)
@pytest.mark.parametrize("shares", [1, 2, 3, 4])
def test_pairs_are_those_of_the_mask(shares: int, causal: bool, window: int | None) -> None:
    length = 24
    mask = seen(length, causal, window)
    for each in (in_order(shares, length), exchanged(shares, length), dealt(shares, length, causal=True, window=5)):
        of = [[at for start, size in chunks for at in range(start, start + size)] for chunks in each]
        assert sorted(at for rows in of for at in rows) == list(range(length))
        for chunks, rows in zip(each, of, strict=True):
            assert pairs(chunks, length, causal=causal, window=window) == mask[rows].sum()
            for start, size in chunks:
                (some,) = np.nonzero(mask[start : start + size].any(0))
                assert keys_of((start, size), length, causal=causal, window=window) == (some[0], some[-1] + 1)


@pytest.mark.parametrize("shares", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("count", [pairs, computed])
def test_causal_work_is_balanced(shares: int, count: object) -> None:
    length = 131_072 // 64 * shares
    work = [count(c, length, causal=True, window=None) for c in dealt(shares, length, causal=True, window=None)]
    assert imbalance(work) == 1
    before = [count(c, length, causal=True, window=None) for c in in_order(shares, length)]
    assert imbalance(before) > 1.3


def test_the_first_chunk_of_every_share_stays_and_the_second_has_one_partner() -> None:
    for shares in (2, 3, 8):
        plain, dealt = in_order(shares, 2 * shares), exchanged(shares, 2 * shares)
        for share, ((first, _), (second, _)) in enumerate(dealt):
            assert first == plain[share][0][0]
            assert second == plain[shares - 1 - share][0][0] + 1


@pytest.mark.parametrize(
    ("length", "causal", "window"),
    [(64, False, None), (64, True, 1), (64, False, 3), (64, True, 6), (12, True, None)],
    ids=["all see all", "each sees itself", "both sides", "a short window", "chunks that are not equal"],
)
def test_queries_stay_if_nothing_is_gained(length: int, causal: bool, window: int | None) -> None:
    assert dealt(4, length, causal=causal, window=window) == in_order(4, length)


@pytest.mark.parametrize("window", [8, 16, 24, 32, 48])
def test_a_window_is_never_worse_than_in_order(window: int) -> None:
    rule = {"causal": True, "window": window}
    before, after = (
        imbalance([pairs(c, 64, **rule) for c in each]) for each in (in_order(4, 64), dealt(4, 64, **rule))
    )
    assert after <= before
