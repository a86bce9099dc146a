"""Mixtures: exact counts, closed-form positions, schedules, and every source's sequence unbroken."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.data import Mixture, Stdlib, batch_hash
from portatrain.data.mixture import Chained, Mixed
from portatrain.data.mixture_fields import check, counts
from portatrain.errors import UserError
from tests.support.token_windows import windows

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)


def parts(number: int, *, permuted: bool = True) -> list:
    return [windows([bytes([65 + i]) * (20 + 7 * i)], 4, permuted=permuted, seed=i) for i in range(number)]


def mixed(weights, block=32, schedule=(), seed=0) -> Mixed:
    spec = Mixture(
        sources=(Stdlib(seq_len=4),) * len(weights), weights=tuple(weights), block=block, schedule=tuple(schedule)
    )
    check(spec)
    return Mixed(spec, parts(len(weights)), name="train", seed=seed)


@given(weights=WEIGHTS, block=st.integers(1, 2000))
def test_counts_are_exact_and_near_the_weights(weights, block):
    got = np.array(counts(tuple(weights), block))
    assert got.sum() == block
    share = block * np.array(weights) / sum(weights)
    assert (np.abs(got - share) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("weights", "block", "want"),
    [((1, 1), 3, [2, 1]), ((0.7, 0.2, 0.1), 10, [7, 2, 1]), ((1, 0), 5, [5, 0]), ((2, 1, 1), 1024, [512, 256, 256])],
)
def test_counts(weights, block, want):
    assert counts(weights, block) == want


@given(data=st.data(), weights=WEIGHTS, block=st.integers(1, 60))
@settings(max_examples=50)
def test_every_source_gives_its_samples_in_order_and_exactly(data, weights, block):
    other = data.draw(st.lists(st.floats(0.01, 10), min_size=len(weights), max_size=len(weights)))
    block = max(block, 1 + int(max(sum(w) / min(w) for w in (weights, other))))
    split = mixed(weights, block, [(2, tuple(other)), (5, tuple(weights))])
    blocks = 7
    source, number = split.locate(np.arange(blocks * block))
    for b in range(blocks):
        used = other if 2 <= b < 5 else weights
        here = source[b * block : (b + 1) * block]
        assert np.bincount(here, minlength=len(weights)).tolist() == counts(tuple(used), block)
    for s in range(len(weights)):
        # Nothing twice, nothing left out, and no block runs ahead of an earlier one.
        assert np.sort(number[source == s]).tolist() == list(range(int((source == s).sum())))
        first = [number[b * block : (b + 1) * block][source[b * block : (b + 1) * block] == s] for b in range(blocks)]
        assert all(a.max() < c.min() for a, c in itertools.pairwise(first) if len(a) and len(c))


def test_what_came_before_is_closed_form():
    split = mixed((3.0, 1.0), 32, [(10**6, (1.0, 3.0)), (10**9, (1.0, 1.0))])
    n = 10**12
    source, number = split.locate(np.arange(n, n + 64))
    block = n // 32
    before = 24 * 10**6 + 8 * (10**9 - 10**6) + 16 * (block - 10**9)
    assert sorted(number[:32][source[:32] == 0]) == list(range(before, before + 16))


@given(start=st.integers(0, 10**9), count=st.integers(1, 80), cut=st.integers(0, 80))
@settings(max_examples=50)
def test_a_batch_does_not_depend_on_how_it_is_cut(start, count, cut):
    split = mixed((2.0, 1.0, 1.0))
    cut = min(cut, count)
    whole, left, right = (split.batch(start, count), split.batch(start, cut), split.batch(start + cut, count - cut))
    assert batch_hash({k: np.concatenate((left[k], right[k])) for k in whole}) == batch_hash(whole)


def test_a_batch_holds_what_the_sources_hold():
    split = mixed((2.0, 1.0, 1.0))
    batch = split.batch(100, 64)
    source, number = split.locate(np.arange(100, 164))
    assert batch["source"].tolist() == source.tolist()
    assert batch["sample"].tolist() == list(range(100, 164))
    for row in range(64):
        alone = parts(3)[source[row]].batch(int(number[row]), 1)
        for key in ("tokens", "targets", "mask", "segment_ids", "positions"):
            assert batch[key][row].tolist() == alone[key][0].tolist()
    assert {k: v.dtype for k, v in split.blank(2).items()} == {k: v.dtype for k, v in batch.items()}


def test_blocks_are_shuffled_by_the_seed():
    first, second = mixed((1.0, 1.0), seed=0), mixed((1.0, 1.0), seed=1)
    a, b = (s.locate(np.arange(64))[0].tolist() for s in (first, second))
    assert a != b
    assert a[:32] != a[32:]
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != mixed((2.0, 1.0)).fingerprint
    assert first.fingerprint != mixed((1.0, 1.0), block=64).fingerprint


def test_evaluation_reads_every_window_of_every_source():
    held = parts(3, permuted=False)
    spec = Mixture(sources=(Stdlib(seq_len=4),) * 3, weights=(1.0,) * 3)
    split = Chained(spec, dict(enumerate(held)), name="validation")
    assert split.windows == sum(p.windows for p in held)
    assert sum(float(b["mask"].sum()) for b in split.once(5)) == sum(20 + 7 * i for i in range(3))
    assert split.bytes_per_target == 1.0


def test_a_source_keeps_its_number_and_name_if_an_earlier_one_holds_nothing_out():
    held = parts(3, permuted=False)
    spec = Mixture(sources=(Stdlib(seq_len=4),) * 4, weights=(1.0,) * 4, names=("web", "code", "none", "code"))
    split = Chained(spec, {0: held[0], 1: held[1], 3: held[2]}, name="validation")
    assert [(g.name, g.sources) for g in split.groups] == [("web", (0,)), ("code", (1, 3))]
    for row in next(iter(split.once(split.windows)))["source"].tolist():
        assert row != 2
    batch = split.batch(0, split.windows)
    for source, part in ((0, held[0]), (1, held[1]), (3, held[2])):
        assert batch["tokens"][batch["source"] == source].tolist() == part.batch(0, part.windows)["tokens"].tolist()
    assert [g.name for g in mixed((1.0, 0.0)).groups] == ["source-0", "source-1"]


BAD = [
    ({"sources": ()}, "at least one source"),
    ({"block": 0}, "block=0"),
    ({"weights": (1.0,)}, "2 finite weights"),
    ({"weights": (1.0, -1.0)}, "2 finite weights"),
    ({"weights": (0.0, 0.0)}, "not all 0"),
    ({"weights": (1.0, float("nan"))}, "finite"),
    ({"weights": (1.0, 1e-6)}, "block of 8, got none of source 1"),
    ({"schedule": ((0, (1.0, 1.0)),)}, "increasing first blocks, from 1"),
    ({"schedule": ((5, (1.0, 1.0)), (5, (1.0, 2.0)))}, "increasing first blocks, from 1"),
    ({"schedule": ((5, (1.0,)),)}, "schedule at block 5"),
    ({"sources": (Stdlib(seq_len=8), Stdlib(seq_len=9))}, "the same seq_len"),
    ({"names": ("code",)}, "2 names"),
    ({"exhausted": "stop"}, "exhausted"),
    ({"names": ("code", "")}, "2 names"),
    ({"names": ("code", "a/b")}, "2 names"),
]


@pytest.mark.parametrize(("fields", "match"), BAD)
def test_contradictions(fields, match):
    good = {"sources": (Stdlib(seq_len=8), Stdlib(seq_len=8)), "weights": (1.0, 1.0), "block": 8}
    check(Mixture(**good))
    with pytest.raises(UserError, match=match):
        check(Mixture(**(good | fields)))
