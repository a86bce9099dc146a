"""Samples that are left out, the documents of a sample, and their names in the source."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.data import DataSpec, Digits, Jsonl, PackedTokens, TextFiles, TokenMemmap, open_data
from portatrain.data.in_sample import parts_of
from portatrain.data.left_out import LeftOut
from portatrain.data.ranges import below, in_words, merged, number_at, ranges, runs_of
from portatrain.data.store import packing
from portatrain.errors import UserError
from tests.support import named_mixture
from tests.support.packed import corpus, packed, tokenizer


def test_the_sequence_without_some_samples_is_a_closed_form() -> None:
    draw = random.Random(0)
    for _ in range(500):
        left_out = merged((a, a + draw.randint(1, 4)) for a in draw.sample(range(40), draw.randint(0, 6)))
        out = {n for a, b in left_out for n in range(a, b)}
        there = [n for n in range(120) if n not in out]
        assert [number_at(i, left_out) for i in range(60)] == there[:60]
        at, count = draw.randint(0, 40), draw.randint(1, 20)
        runs = runs_of(at, count, left_out)
        assert [n for first, many in runs for n in range(first, first + many)] == there[at : at + count]
        assert all(many for _, many in runs)
        assert ranges(in_words(left_out), "x") == left_out
        assert {n for a, b in below(left_out, 20) for n in range(a, b)} == {n for n in out if n < 20}


@pytest.mark.parametrize("word", ["", "x", "3:3", "5:2", "-1", "1:2:3", "1.5", "9" * 20])
def test_words_that_name_no_sample(word: str) -> None:
    with pytest.raises(UserError, match="the number of a sample"):
        ranges([word], "leave_out")


def text_files(tmp_path: Path, **more: Any) -> TextFiles:
    made = corpus(tmp_path / "corpus", documents=30, words=120)
    return TextFiles(paths=str(made), seq_len=48, validation=0.2, **more)


def test_batches_without_samples_have_the_others_with_their_numbers(tmp_path: Path) -> None:
    whole = open_data(text_files(tmp_path), seed=5).train
    split = LeftOut(whole, ((3, 5), (9, 10)))
    there = [n for n in range(40) if n not in (3, 4, 9)]
    got = split.batch(2, 9)
    assert got["sample"].tolist() == there[2:11]
    for row, n in enumerate(there[2:11]):
        for key, value in whole.batch(n, 1).items():
            np.testing.assert_array_equal(got[key][row], value[0])
    rows = np.arange(9) % 2 == 0
    some = split.part(2, 9, rows)
    assert some["sample"].tolist() == there[2:11]
    np.testing.assert_array_equal(some["tokens"][rows], got["tokens"][rows])
    assert split.fingerprint == whole.fingerprint and len(next(split.once(4))["sample"]) == 4


def check(spec: DataSpec, texts: Any, seed: int = 1, samples: int = 40) -> set[str]:
    """Every document of the samples has the tokens that the source has at its place; return their files."""
    data = open_data(spec, seed=seed)
    found = parts_of(spec, data, range(samples))
    files = set()
    for number, parts in found.items():
        row = data.train.batch(number, 1)
        inside = np.zeros_like(row["mask"], bool)
        for part in parts:
            assert part.file is not None and part.tokens is not None, part.why
            whole = texts(part)
            assert part.tokens.tolist() == list(whole[part.first : part.first + len(part.tokens)])
            here = slice(part.column, part.column + part.count)
            assert row["tokens"][0, here].tolist()[part.count - len(part.tokens) :] == part.tokens.tolist()
            inside[0, here] = True
            files.add(part.file)
        np.testing.assert_array_equal(inside, row["segment_ids"] > 0)  # the parts are the sample
    return files


@pytest.mark.parametrize("how", ["windows", "best-fit", "single"])
def test_documents_of_text_files(how: Any, tmp_path: Path) -> None:
    """Two of the documents have no content, so the number in the pack is not the place in the order."""
    spec = text_files(tmp_path, packing=how)
    assert len(check(spec, lambda part: (tmp_path / "corpus" / part.file).read_bytes())) > 10


@pytest.mark.parametrize("by", ["bytes", "tokenizer"])
def test_documents_of_a_packed_store_of_many_groups(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 7)
    monkeypatch.setattr(packing, "GROUP_BYTES", 3000)
    given = {} if by == "bytes" else {"tokenizer": str(tokenizer(tmp_path / "tokenizer.json"))}
    spec = text_files(tmp_path, **given)
    assert packed(spec, tmp_path / "store").splits["train"].groups > 3
    from portatrain.data.encode import encoding

    encode = encoding(given.get("tokenizer"), None)

    def texts(part: Any) -> list[int]:
        return encode((tmp_path / "corpus" / part.file).read_bytes(), "").tolist()

    stored = PackedTokens(path=str(tmp_path / "store"), seq_len=48)
    assert len(check(stored, texts)) > 10
    monkeypatch.setattr("portatrain.data.document_names.SCAN", 100)
    check(stored, texts)  # counted in many pieces


def test_records_have_the_number_of_their_line(tmp_path: Path) -> None:
    lines = [{"text": f"line {n} " * (n % 5 + 1)} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = Jsonl(paths=str(tmp_path / "a.jsonl"), seq_len=16, validation=0.1)
    check(spec, lambda part: lines[part.index]["text"].encode(), samples=20)
    data = open_data(spec, seed=0)
    names = {part.name for parts in parts_of(spec, data, range(20)).values() for part in parts}
    assert any(name.startswith("a.jsonl, record ") for name in names)


def test_a_source_that_changed_or_is_gone_gives_no_name(tmp_path: Path) -> None:
    spec = text_files(tmp_path)
    open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    for file in (tmp_path / "corpus").iterdir():
        file.write_bytes(file.read_bytes()[::-1])
    data = open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    (part, *_) = parts_of(spec, data, [3])[3]
    assert part.file is None and "has been changed since it was packed" in part.why
    assert part.name == f"document {part.document} of TextFiles"
    (tmp_path / "corpus").rename(tmp_path / "away")
    (part, *_) = parts_of(spec, data, [3])[3]
    assert part.file is None and "cannot be read here" in part.why


def test_ids_and_images(tmp_path: Path) -> None:
    np.arange(1, 200, dtype="<u2").tofile(tmp_path / "a.bin")
    spec = TokenMemmap(paths=str(tmp_path / "a.bin"), seq_len=10, vocab=300, validation=0.0)
    check(spec, lambda part: range(1, 200), samples=15)
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    digits = Digits()
    data = open_data(digits, seed=2)
    for number, (part,) in parts_of(digits, data, range(30)).items():
        row = data.train.batch(number, 1)
        np.testing.assert_array_equal(row["image"].ravel() * 16, pixels[part.document].astype(np.float32))
        assert part.values is not None and part.values["label"] == labels[part.document] == row["label"][0]


def test_a_mixture_says_its_own_names(tmp_path: Path) -> None:
    """Two sources may have one name, so the number is said too."""
    spec = named_mixture.mixture(tmp_path)
    said = {part.source for parts in parts_of(spec, open_data(spec, seed=1), range(40)).values() for part in parts}
    known = {f"{name} (TextFiles, source {number})" for number, name in enumerate(spec.names)}
    assert said <= known and len(said) > 2, (said, known)
