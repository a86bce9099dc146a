"""Packing into windows, order of epochs, batches by number: against a slow oracle and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.data import batch_hash
from portatrain.data.corpus import Stream
from portatrain.errors import UserError
from tests.support.token_windows import windows

KEYS = {
    "tokens": np.int32,
    "targets": np.int32,
    "mask": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "sample": np.int64,
}


def by_hand(documents: list[bytes], seq_len: int) -> list[dict[str, list]]:
    """Every window, token by token."""
    flat = []
    for number, document in enumerate(documents):
        flat += [(0, number, True)] + [(b, number, False) for b in document]
    out = []
    for begin in range(0, len(flat) - 1, seq_len):
        window = {k: [] for k in KEYS if k != "sample"}
        segment, position, last = 0, 0, None
        for i in range(begin, begin + seq_len):
            if i < len(flat):
                segment, position = (segment, position + 1) if flat[i][1] == last else (segment + 1, 0)
                last = flat[i][1]
            real = i + 1 < len(flat)
            window["tokens"].append(flat[i][0] if i < len(flat) else 0)
            window["segment_ids"].append(segment if i < len(flat) else 0)
            window["positions"].append(position if i < len(flat) else 0)
            window["targets"].append(flat[i + 1][0] if real else 0)
            window["mask"].append(float(real and not flat[i + 1][2]))
        out.append(window)
    return out


DOCUMENTS = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=8)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_windows_agree_with_the_oracle(documents, seq_len):
    split, want = windows(documents, seq_len), by_hand(documents, seq_len)
    assert split.windows == len(want)
    got = split.batch(0, split.windows)
    assert {k: v.dtype for k, v in got.items()} == KEYS
    for key in want[0]:
        assert got[key].tolist() == [w[key] for w in want], key
    assert got["sample"].tolist() == list(range(split.windows))


@given(documents=DOCUMENTS, seq_len=st.integers(1, 12), epoch=st.integers(0, 10**6), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_byte_is_a_target_once_an_epoch(documents, seq_len, epoch, seed):
    size = sum(map(len, documents)) + len(documents)
    seq_len = min(seq_len, size - 1)
    split = windows(documents, seq_len, permuted=True, seed=seed)
    # Distinct bytes would not do: what counts is each *place*, so the stream's places stand for its tokens.
    places = Stream(tokens=np.arange(size), starts=split.stream.starts, vocab=size, bos=0, bytes=None, fingerprint="")
    split.stream = places
    got = split.batch(epoch * split.windows, split.windows)
    targets = np.sort(got["targets"][got["mask"] == 1])
    assert targets.tolist() == sorted(set(range(size)) - set(places.starts.tolist()))
    # The token before a target stands in the same segment, so no target is read across documents.
    same = (got["targets"] - got["tokens"])[got["mask"] == 1]
    assert (same == 1).all()


@given(data=st.data(), documents=DOCUMENTS, seq_len=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_batch_does_not_depend_on_how_it_is_cut(data, documents, seq_len):
    seq_len = min(seq_len, sum(map(len, documents)) + len(documents) - 1)
    split = windows(documents, seq_len, permuted=True, seed=4)
    start, count = data.draw(st.integers(0, 10**12)), data.draw(st.integers(1, 40))
    cut = data.draw(st.integers(0, count))
    whole, left, right = (split.batch(start, count), split.batch(start, cut), split.batch(start + cut, count - cut))
    joined = {k: np.concatenate((left[k], right[k])) for k in whole}
    assert batch_hash(joined) == batch_hash(whole)
    again = windows(documents, seq_len, permuted=True, seed=4)
    assert batch_hash(again.batch(start, count)) == batch_hash(whole)


def test_epochs_are_permuted_by_seed_and_epoch_and_validation_is_not():
    documents = [bytes(range(1, 200))]
    split = windows(documents, 2, permuted=True, seed=1)
    n = split.windows
    first, second = split.batch(0, n)["tokens"], split.batch(n, n)["tokens"]
    other = windows(documents, 2, permuted=True, seed=2).batch(0, n)["tokens"]
    assert len({a.tobytes() for a in (first, second, other)}) == 3
    for a in (first, second, other):
        assert np.array_equal(np.sort(a[:, 0]), np.sort(first[:, 0]))
    held = windows(documents, 2)
    assert np.array_equal(held.batch(0, n)["tokens"], held.batch(7 * n, n)["tokens"])
    assert held.batch(7 * n, 2)["sample"].tolist() == [7 * n, 7 * n + 1]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 50])
def test_once_reads_every_window_once(count):
    split = windows([b"abcdefghijklm", b"nop"], 3)
    batches = list(split.once(count))
    assert all(len(v) == count for b in batches for v in b.values())
    assert all({k: v.dtype for k, v in b.items()} == KEYS for b in batches)
    sample = np.concatenate([b["sample"] for b in batches])
    assert sample[sample >= 0].tolist() == list(range(split.windows))
    assert sum(float(b["mask"].sum()) for b in batches) == 16
    assert all(not b["mask"][b["sample"] < 0].any() for b in batches)


@pytest.mark.parametrize(("documents", "seq_len", "found"), [([b"abc"], 4, 4), ([b"a", b"b"], 4, 4)])
def test_too_small_says_what_was_found_and_what_is_needed(documents, seq_len, found):
    with pytest.raises(UserError, match=f"at least 5 tokens.*got {found} tokens in {len(documents)} doc"):
        windows(documents, seq_len, permuted=True)


def test_a_batch_larger_than_the_data():
    split = windows([b"abcdef"], 3, permuted=True)
    split.require(2)
    with pytest.raises(UserError, match="at least 3 samples, one batch, got 2"):
        split.require(3)


def test_bytes_per_target_and_fingerprint():
    split = windows([b"abcdef", b"gh"], 3)
    assert split.bytes_per_target == 1.0
    assert split.fingerprint == windows([b"abcdef", b"gh"], 3, seed=5).fingerprint
    assert split.fingerprint != windows([b"abcdef", b"gh"], 4).fingerprint


def test_batch_hash_sees_every_change():
    batch = windows([b"abcdef", b"gh"], 3).batch(0, 2)
    base = batch_hash(batch)
    assert batch_hash(dict(reversed(batch.items()))) == base
    assert batch_hash({k: np.asfortranarray(v) for k, v in batch.items()}) == base
    for key, value in batch.items():
        changed = value.copy()
        changed.flat[-1] += 1
        assert batch_hash(batch | {key: changed}) != base
        assert batch_hash(batch | {key: value.astype(np.float64)}) != base
        assert batch_hash(batch | {key: value[:1]}) != base
        assert batch_hash({k: v for k, v in batch.items() if k != key}) != base


def test_negative_samples():
    with pytest.raises(ValueError, match="do not exist"):
        windows([b"abcdef"], 3).batch(-1, 2)
