"""Samples of whole documents: every pair of an input and its target exactly once, no document cut without need, and the
same samples however many hosts read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.data import Jsonl, Mixture, TextFiles, batch_hash, open_data
from portatrain.data import fill as filling
from portatrain.data.fill import Samples, best_fit
from portatrain.data.text_batches import Whole
from portatrain.errors import UserError
from tests.support.token_windows import stream

DOCUMENTS = st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=12)


def whole(documents: list[bytes], seq_len: int, *, single: bool = False, permuted: bool = False) -> Whole:
    return Whole(
        stream(documents), name="train", seq_len=seq_len, seed=3, permuted=permuted, order="data/train", single=single
    )


def naive(lengths: list[int], size: int) -> list[list[int]]:
    """Best fit, decreasing, by the rule alone: the pieces of each sample; ties go to the sample changed last."""
    made: list[list[int]] = []
    changed: list[int] = []
    for clock, piece in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        rooms = [size - sum(lengths[i] for i in one) for one in made]
        fits = [k for k, room in enumerate(rooms) if room >= lengths[piece]]
        if fits:
            k = min(fits, key=lambda k: (rooms[k], -changed[k]))
            made[k].append(piece)
            changed[k] = clock
        else:
            made.append([piece])
            changed.append(clock)
    return made


@given(size=st.integers(1, 12), data=st.data())
@settings(deadline=None)
def test_best_fit_is_the_rule_by_hand(size: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, size), min_size=1, max_size=24))
    order, ends = best_fit(np.array(lengths), size)
    got = [sorted(part.tolist()) for part in np.split(order, ends[:-1])]
    assert got == [sorted(one) for one in naive(lengths, size)]


def test_best_fit_wastes_little() -> None:
    lengths = np.random.default_rng(0).geometric(1 / 300, 20_000).clip(1, 1024)
    _, ends = best_fit(lengths, 1024)
    assert len(ends) <= np.ceil(lengths.sum() / 1024) * 1.01  # 1 % of padding; one document a sample has 70 %


@given(documents=DOCUMENTS, seq_len=st.integers(1, 9), single=st.booleans(), permuted=st.booleans())
@settings(deadline=None)
def test_every_pair_is_in_one_sample_and_no_segment_crosses_a_document(
    documents: list[bytes], seq_len: int, single: bool, permuted: bool
) -> None:
    split = whole(documents, seq_len, single=single, permuted=permuted)
    want = sorted(
        (d, a, b)
        for d, text in enumerate(documents)
        for a, b in zip([-1, *range(len(text))], range(len(text)), strict=False)
    )
    batch = split.batch(0, split.windows)
    pairs: list[tuple[int, ...]] = []
    pieces = split._samples
    for row, window in enumerate(split._order(np.arange(split.windows)).tolist()):
        at = 0
        for segment, (document, begin, count) in enumerate(pieces[window], 1):
            here = slice(at, at + count)
            text = b"\0" + documents[document]
            assert batch["tokens"][row, here].tolist() == list(text[begin : begin + count])
            assert batch["targets"][row, here].tolist() == list(text[begin + 1 : begin + count + 1])
            assert (batch["segment_ids"][row, here] == segment).all() and (batch["mask"][row, here] == 1).all()
            assert batch["positions"][row, here].tolist() == list(range(count))
            pairs += [(document, i - 1, i) for i in range(begin, begin + count)]
            at += count
        for key in ("tokens", "targets", "segment_ids", "positions", "mask"):
            assert not batch[key][row, at:].any()
        if single:
            assert len(pieces[window]) == 1
    assert sorted(pairs) == want
    counts = np.bincount([d for w in range(split.windows) for d, *_ in pieces[w]], minlength=len(documents))
    assert counts.tolist() == [-(-len(text) // seq_len) for text in documents]  # only what is too long is cut


@given(documents=DOCUMENTS, seq_len=st.integers(1, 9), single=st.booleans(), hosts=st.sampled_from([1, 3, 8]))
@settings(deadline=None, max_examples=40)
def test_the_same_samples_for_any_number_of_hosts(
    documents: list[bytes], seq_len: int, single: bool, hosts: int
) -> None:
    split = whole(documents, seq_len, single=single, permuted=True)
    again = whole(documents, seq_len, single=single, permuted=True)
    steps, batch = 3, 24
    for step in range(steps):
        rows = [again.batch(step * batch + h * (batch // hosts), batch // hosts) for h in range(hosts)]
        joined = {key: np.concatenate([one[key] for one in rows]) for key in rows[0]}
        assert batch_hash(split.batch(step * batch, batch)) == batch_hash(joined)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), single=st.booleans())
@settings(deadline=None, max_examples=40)
def test_blocks_only_limit_the_memory(lengths: list[int], single: bool) -> None:
    made = Samples(np.array(lengths), 8, single=single)
    before = filling.BLOCK
    filling.BLOCK = 5
    try:
        blocks = Samples(np.array(lengths), 8, single=single)
    finally:
        filling.BLOCK = before
    one, other = (sorted(piece for w in range(len(s)) for piece in s[w]) for s in (made, blocks))
    assert one == other and len(blocks) >= len(made)
    if single:
        assert [made[w] for w in range(len(made))] == [blocks[w] for w in range(len(blocks))]


def corpus(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for n in range(24):
        (folder / f"{n}.txt").write_text(f"document {n}. " * (1 + n % 5))
    return {"paths": str(folder), "seq_len": 32, "validation": 0.3}


def test_one_pack_serves_every_way(tmp_path: Path) -> None:
    fields = corpus(tmp_path / "corpus")
    prints, bytes_ = set(), 0
    for packing in ("windows", "best-fit", "single"):
        data = open_data(TextFiles(**fields, packing=packing), seed=0, pack_dir=tmp_path / "pack")
        assert data.validation is not None and data.bytes_per_target == 1.0
        counted = sum(int(b["mask"].sum()) for split in (data.train, data.validation) for b in split.once(5))
        bytes_ = bytes_ or counted
        assert counted == bytes_  # each byte is a target once, in any way
        prints.add(data.fingerprint)
    assert len(prints) == 3
    # A pack of a release without the field is that of "windows".
    assert "packing" not in (tmp_path / "pack" / "pack.json").read_text()


def test_in_a_mixture_and_in_small_corpora(tmp_path: Path) -> None:
    fields = corpus(tmp_path / "corpus")
    whole_, cut = TextFiles(**fields, packing="best-fit"), TextFiles(**fields)
    data = open_data(Mixture(sources=(whole_, cut), weights=(1.0, 1.0), block=8), seed=0)
    batch = data.train.batch(0, 16)
    padded = (batch["segment_ids"] == 0).any(axis=1)
    assert padded[batch["source"] == 0].any() and np.bincount(batch["source"]).tolist() == [8, 8]
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    few = Jsonl(paths=str(tmp_path / "a.jsonl"), seq_len=64, validation=0, packing="single")
    assert open_data(few, seed=0).train.windows == 2
    with pytest.raises(UserError, match=r"Jsonl packing: expected one of best-fit, single, windows, got 'fit'"):
        open_data(Jsonl(paths=str(tmp_path / "a.jsonl"), seq_len=64, packing="fit"), seed=0)  # type: ignore[arg-type]
