"""Every source: which documents it finds, how it splits them, and what it says of bad input."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from portatrain.data import Digits, Jsonl, Mixture, Stdlib, TextFiles, TokenMemmap, open_data
from portatrain.data.corpus import streams
from portatrain.data.finding import find
from portatrain.data.sources import documents, stdlib_files
from portatrain.errors import UserError
from tests.support.folders import listing

TEXTS = {f"d/{i}.txt": f"document {i} ".encode() * (i + 1) for i in range(30)}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def contents(spec) -> dict[str, list[bytes]]:
    """The documents of each split, as bytes, in any order."""
    return {name: sorted(np.asarray(d, np.uint8).tobytes() for d in s) for name, s in streams(spec, None).items()}


def everything(spec) -> list[bytes]:
    return sorted(d for split in contents(spec).values() for d in split)


@pytest.mark.parametrize(
    "paths", ["d", "d/*.txt", "**/*.txt", ("d/1*.txt", "d/[!1]*.txt"), ("d", "d/3.txt", "d/*.txt")]
)
def test_text_files_by_any_path(tmp_path, monkeypatch, paths):
    write(tmp_path, TEXTS)
    monkeypatch.chdir(tmp_path)
    assert everything(TextFiles(paths=paths, seq_len=8)) == sorted(TEXTS.values())


def test_names_do_not_depend_on_the_place(tmp_path):
    for place in ("a", "somewhere/else"):
        write(tmp_path / place, TEXTS)
    for tail in ("d", "d/*.txt", "d/7.txt"):
        here, there = (find(str(tmp_path / place / tail), "x") for place in ("a", "somewhere/else"))
        assert [n for n, _ in here] == [n for n, _ in there]
        assert [n for n, _ in here] == sorted(n for n, _ in here)


def test_empty_documents_are_passed_over(tmp_path):
    write(tmp_path, {"a": b"", "b": b"bbbb", "c": b""})
    assert everything(TextFiles(paths=str(tmp_path), seq_len=2, validation=0)) == [b"bbbb"]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n\n" * (i % 3 == 0) + "\n" for i, t in enumerate(texts)).encode()


def test_jsonl(tmp_path):
    texts = [f"line {i} é\0" for i in range(40)]
    write(tmp_path, {"a.jsonl": jsonl(texts[:25]), "b.jsonl": jsonl(texts[25:])[:-1]})
    spec = Jsonl(paths=str(tmp_path / "*.jsonl"), seq_len=8)
    assert everything(spec) == sorted(t.encode() for t in texts)
    assert len(contents(spec)["validation"]) in range(1, 15)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64", "uint64"])
@pytest.mark.parametrize(
    ("ids", "separator", "want"),
    [
        ([1, 2, 3, 9, 4, 5, 9], 9, [[1, 2, 3], [4, 5]]),
        ([9, 1, 2, 3, 9, 9, 4, 5], 9, [[1, 2, 3], [4, 5]]),
        ([0, 1, 2, 0, 3], 0, [[1, 2], [3]]),
        ([1, 2, 3], None, [[1, 2, 3]]),
    ],
)
def test_token_memmap(tmp_path, dtype, ids, separator, want):
    np.array(ids, dtype).tofile(tmp_path / "tokens.bin")
    spec = TokenMemmap(paths=str(tmp_path), seq_len=2, vocab=10, dtype=dtype, separator=separator, validation=0)
    stream = streams(spec, None)["train"]
    assert sorted(d.tolist() for d in stream) == want
    assert stream.bos == (separator or 0)
    assert stream.tokens.dtype == np.uint8  # what ten ids need, whatever the file used
    assert stream.bytes is None
    assert open_data(spec, seed=0).bytes_per_target is None


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_token_files_that_numpy_saved(tmp_path, dtype):
    ids = np.array([1, 2, 3, 9, 4, 5, 9], dtype)
    np.save(tmp_path / "tokens.npy", ids)
    ids.tofile(tmp_path / "tokens.bin")
    given = {"seq_len": 2, "vocab": 10, "dtype": dtype, "separator": 9, "validation": 0}
    saved, raw = (
        streams(TokenMemmap(paths=str(tmp_path / f"tokens.{end}"), **given), None)["train"] for end in ("npy", "bin")
    )
    # The order of documents follows the file's name; the documents are the same.
    assert sorted(d.tolist() for d in saved) == sorted(d.tolist() for d in raw) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([1, 2, 3], "<u4"), "got uint32 of shape"),
        (np.array([[1, 2], [3, 4]], "<u2"), r"got uint16 of shape \(2, 2\)"),
        (np.array([1.0, 2.0]), "got float64"),
        (np.array([{}]), "numpy.save"),
    ],
)
def test_npy_files_of_something_else_are_refused(tmp_path, array, said):
    np.save(tmp_path / "tokens.npy", array)
    spec = TokenMemmap(paths=str(tmp_path / "tokens.npy"), seq_len=2, vocab=10, validation=0)
    with pytest.raises(UserError, match=said):
        open_data(spec, seed=0)


def test_stdlib_is_the_library_without_tests_and_machine_paths(tmp_path):
    kept = {"os.py": b"1", "json/decoder.py": b"2", "lib2to3/main.py": b"3"}
    left = ["site-packages/x.py", "test/a.py", "idlelib/idle_test/b.py", "json/tests/c.py", "os.txt"]
    write(tmp_path, kept | dict.fromkeys([*left, "_sysconfigdata__linux_.py"], b"no"))
    assert [n for n, _ in stdlib_files(tmp_path)] == sorted(kept)
    with pytest.raises(UserError, match="has no source files"):
        stdlib_files(tmp_path / "idlelib" / "nothing")


def test_stdlib_whole():
    data = open_data(Stdlib(seq_len=256), seed=0)
    names = [n for n, _ in stdlib_files()]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if "site-packages" in n or "/test/" in n]
    assert (data.vocab, data.bytes_per_target) == (256, 1.0)
    held, trained = data.streams["validation"], data.streams["train"]
    assert 0.05 < len(held.starts) / (len(held.starts) + len(trained.starts)) < 0.15
    assert trained.bytes > 5_000_000
    assert data.fingerprint == open_data(Stdlib(seq_len=256), seed=9).fingerprint
    assert data.fingerprint != open_data(Stdlib(seq_len=255), seed=0).fingerprint


def test_the_split_is_by_document_and_stays_when_documents_come(tmp_path):
    write(tmp_path / "few", TEXTS)
    write(tmp_path / "many", TEXTS | {f"d/new{i}.txt": b"new %d" % i for i in range(30)})
    few, many = (contents(TextFiles(paths=str(tmp_path / p), seq_len=8, validation=0.3)) for p in ("few", "many"))
    for split in ("train", "validation"):
        assert few[split]
        assert set(few[split]) == set(many[split]) & set(TEXTS.values())
    assert not set(few["train"]) & set(few["validation"])


def test_the_fraction_held_out():
    # 20,000 lines: a binomial of 0.1 has a standard deviation of 0.0021.
    source = documents(Stdlib(seq_len=1))
    source.files, source.file, source.index = ([("f", Path("f"))], np.zeros(20_000, np.int64), np.arange(20_000))
    source._trained = 1
    assert abs(source.held_out(0.1).mean() - 0.1) < 0.011
    assert not source.held_out(0.0).any()


def test_validation_paths(tmp_path):
    write(tmp_path, TEXTS | {"held/a": b"held one", "held/b": b"held two"})
    spec = TextFiles(paths=str(tmp_path / "d"), validation_paths=str(tmp_path / "held"), seq_len=8, validation=0.5)
    assert contents(spec) == {"train": sorted(TEXTS.values()), "validation": [b"held one", b"held two"]}
    with pytest.raises(UserError, match="cannot be held out"):
        open_data(dataclasses.replace(spec, validation_paths=str(tmp_path / "d" / "3.txt")), seed=0)


@pytest.mark.parametrize("count", range(2, 10))
def test_a_small_corpus_holds_out_one_document_at_least(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    source = documents(TextFiles(seq_len=4, paths=str(tmp_path), validation=0.01))
    held = source.held_out(0.01)
    assert held.sum() == 1
    more = documents(TextFiles(seq_len=4, paths=str(tmp_path), validation=0.9)).held_out(0.9)
    assert more[held].all()  # the document with the lowest word is held out at any fraction


def test_nothing_held_out(tmp_path):
    write(tmp_path, TEXTS)
    data = open_data(TextFiles(paths=str(tmp_path), seq_len=8, validation=0), seed=0)
    assert data.validation is None
    assert data.bytes_per_target == 1.0


def test_digits():
    data = open_data(Digits(), seed=0)
    assert data.train.windows + data.validation.windows == 1797
    assert 0.15 < data.validation.windows / 1797 < 0.25
    batch = data.train.batch(data.train.windows - 2, 5)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((5, 8, 8, 1), "float32"),
        "label": ((5,), "int32"),
        "mask": ((5,), "float32"),
        "sample": ((5,), "int64"),
    }
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    want = sorted((int(y), (x / 16).astype(np.float32).tobytes()) for x, y in zip(pixels, labels, strict=True))
    got = []
    for split in (data.train, data.validation):
        whole = split.batch(0, split.windows)
        assert whole["image"].min() == 0 and whole["image"].max() == 1
        got += [(int(y), x.tobytes()) for x, y in zip(whole["image"], whole["label"], strict=True)]
        last = list(split.once(100))[-1]
        assert last["mask"].sum() == split.windows % 100
        assert last["image"].shape == (100, 8, 8, 1)
    assert sorted(got) == want


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator((t.decode() for t in TEXTS.values()), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_tokenizer(tmp_path, tokenizer, bos):
    import tokenizers

    write(tmp_path, TEXTS)
    spec = TextFiles(paths=str(tmp_path), seq_len=8, validation=0.3, tokenizer=str(tokenizer), bos=bos)
    data, made = open_data(spec, seed=0), tokenizers.Tokenizer.from_file(str(tokenizer))
    size = made.get_vocab_size()
    assert (data.vocab, data.streams["train"].bos) == ((size, made.token_to_id("<s>")) if bos else (size + 1, size))
    texts = [made.decode(d.tolist()).encode() for s in data.streams.values() for d in s]
    assert sorted(texts) == sorted(TEXTS.values())
    stream = data.streams["validation"]
    targets = sum(float(b["mask"].sum()) for b in data.validation.once(4))
    assert data.bytes_per_target * targets == pytest.approx(sum(len(made.decode(d.tolist())) for d in stream))
    folder = dataclasses.replace(spec, tokenizer=str(tokenizer.parent))
    assert open_data(folder, seed=0).fingerprint == data.fingerprint


def _truncates(made):
    made.enable_truncation(max_length=2)


def _pads(made):
    made.enable_padding(length=64, pad_id=0)


def _drops(made):
    made.model.dropout = 0.9


@pytest.mark.parametrize("changes", [(_truncates,), (_pads,), (_drops,), (_truncates, _pads, _drops)])
def test_what_a_tokenizer_does_for_batches_is_not_done_to_a_corpus(tmp_path, tokenizer, changes):
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(tokenizer))
    for change in changes:
        change(made)
    made.save(str(tmp_path / "changed.json"))
    write(tmp_path, TEXTS)
    spec = TextFiles(paths=str(tmp_path / "d"), seq_len=8, tokenizer=str(tokenizer))
    changed = dataclasses.replace(spec, tokenizer=str(tmp_path / "changed.json"))
    assert open_data(changed, seed=0).fingerprint == open_data(spec, seed=0).fingerprint


@pytest.mark.parametrize("added", [(), ("<s>",), ("<s>", "<t>")])
@pytest.mark.parametrize("top", [2, 3, 254, 255, 256, 295, 65_535, 65_536])
def test_a_vocabulary_ends_after_its_largest_id(tmp_path, top, added):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "low": 1, "high": top}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(list(added))
    made.save(str(tmp_path / "tokenizer.json"))
    words = ["low", "high", *added]
    ids = [made.token_to_id(word) for word in words]
    (tmp_path / "a.txt").write_text(" ".join(words))
    spec = TextFiles(paths=str(tmp_path / "a.txt"), seq_len=2, validation=0, tokenizer=str(tmp_path))
    data = open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    assert data.streams["train"].document(0).tolist() == ids
    assert (data.vocab, data.streams["train"].bos) == (max(ids) + 2, max(ids) + 1)


DATA = {
    "good.jsonl": b'{"text": "good"}\n' * 9,
    "broken.jsonl": b'{"text": "good"}\n\n{"text": "bro',
    "list.jsonl": b'{"text": "good"}\n[1]\n',
    "field.jsonl": b'{"text": "good"}\n{"txt": "x", "id": 1}\n',
    "number.jsonl": b'{"text": "good"}\n{"text": 7}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "latin.jsonl": b'{"text": "\xe9"}\n',
    "empty/nothing.txt": b"",
    "small/one.txt": b"12345",
    "latin/one.txt": b"caf\xe9" * 9,
    "ids": np.array([1, 2, 300], np.uint16).tobytes(),
    "negative": np.array([1, -2, 3], np.int32).tobytes(),
    "odd": b"123",
    "bad.json": b"{}",
}

BAD = [
    # what the user asked for, and what the message must name
    ("TextFiles", {"paths": "nowhere"}, ["nowhere", "glob"]),
    ("TextFiles", {"paths": "*.none"}, ["*.none"]),
    ("TextFiles", {"paths": "nowhere/in/*.txt"}, ["nowhere/in", "Check the path"]),
    ("TextFiles", {"paths": "small/one.txt/*.txt"}, ["one.txt/", "Check the path"]),
    ("TextFiles", {"paths": ("small", "nowhere")}, ["nowhere"]),
    ("TextFiles", {"paths": "empty", "validation": 0}, ["at least one document", "0 tokens|all documents without"]),
    ("TextFiles", {"paths": "small", "validation": 0}, ["at least 9 tokens", "seq_len=8", "got 6 tokens in 1 "]),
    ("TextFiles", {"paths": "latin", "validation": 1e-9}, ["validation split", "validation_paths"]),
    ("TextFiles", {"paths": "small", "validation": 1.0}, ["fraction", "1.0"]),
    ("TextFiles", {"paths": "small", "validation": -0.1}, ["fraction"]),
    ("TextFiles", {"paths": "small", "seq_len": 0}, ["seq_len", "at least 1"]),
    ("TextFiles", {"paths": "small", "validation_paths": "nowhere"}, ["validation_paths", "nowhere"]),
    ("TextFiles", {"paths": "small", "bos": "<s>"}, ["bos", "<s>"]),
    ("TextFiles", {"paths": "small", "tokenizer": "nowhere"}, ["tokenizer nowhere", "nothing is downloaded"]),
    ("TextFiles", {"paths": "small", "tokenizer": "bad.json"}, ["tokenizer bad.json"]),
    ("TextFiles", {"paths": "latin", "validation": 0, "tokenizer": "TOKENIZER"}, ["latin/one.txt", "UTF-8"]),
    ("TextFiles", {"paths": "small", "tokenizer": "TOKENIZER", "bos": "<no>"}, ["bos", "<no>"]),
    ("Jsonl", {"paths": "broken.jsonl"}, ["broken.jsonl, line 3"]),
    ("Jsonl", {"paths": "list.jsonl"}, ["list.jsonl, line 2", "got list"]),
    ("Jsonl", {"paths": "field.jsonl"}, ["field.jsonl, line 2, field", "id, txt", "Did you mean txt"]),
    ("Jsonl", {"paths": "good.jsonl", "field": "body"}, ["line [1-9], field", "'body'"]),
    ("Jsonl", {"paths": "number.jsonl"}, ["number.jsonl, line 2", "got int"]),
    ("Jsonl", {"paths": "surrogate.jsonl"}, ["surrogate.jsonl, line 1", "surrogate"]),
    ("Jsonl", {"paths": "latin.jsonl"}, ["latin.jsonl, line 1", "utf-8"]),
    ("TokenMemmap", {"paths": "ids", "vocab": 256}, ["token 2 of", "ids", "0 to 255", "300"]),
    ("TokenMemmap", {"paths": "negative", "vocab": 256, "dtype": "int32"}, ["token 1 of", "got -2"]),
    ("TokenMemmap", {"paths": "odd", "vocab": 256}, ["odd", "2-byte", "3 bytes"]),
    ("TokenMemmap", {"paths": "ids", "vocab": 256, "dtype": "float32"}, ["dtype", "float32", "uint16"]),
    ("TokenMemmap", {"paths": "ids", "vocab": 70_000}, ["vocab", "65536", "70000"]),
    ("TokenMemmap", {"paths": "ids", "vocab": 256, "separator": 256}, ["separator", "0 to 255"]),
    ("TokenMemmap", {"paths": "ids", "vocab": 0}, ["vocab"]),
    ("Digits", {"validation": 1.5}, ["Digits.validation", "1.5"]),
    ("Digits", {"validation": 1e-9}, ["Digits validation", "none in validation"]),
]


@pytest.mark.parametrize(("kind", "fields", "names"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(tmp_path, monkeypatch, tokenizer, kind, fields, names):
    import re

    write(tmp_path, DATA)
    monkeypatch.chdir(tmp_path)
    kinds = {c.__name__: c for c in (TextFiles, Jsonl, TokenMemmap, Digits)}
    fields = {k: str(tokenizer) if v == "TOKENIZER" else v for k, v in fields.items()}
    if kind == "Jsonl":
        fields["validation"] = 0
    if kind != "Digits":
        fields = {"seq_len": 8} | fields
    before = listing(tmp_path)
    with pytest.raises(UserError) as caught:
        open_data(kinds[kind](**fields), seed=0, pack_dir="runs/a/pack")
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert re.search(name.replace("*", r"\*"), message), (name, message)
    assert listing(tmp_path) == before


def test_an_unreadable_file(tmp_path, monkeypatch):
    write(tmp_path, TEXTS)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"data file .*\.txt.*Permission denied"):
        open_data(TextFiles(paths=str(tmp_path), seq_len=8), seed=0)


@pytest.mark.parametrize(
    ("module", "spec"),
    [("sklearn", Digits()), ("tokenizers", TextFiles(paths=__file__, seq_len=8, tokenizer="t.json"))],
)
def test_a_missing_package_says_what_to_install(monkeypatch, module, spec):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'portatrain\[data\]'"):
        open_data(spec, seed=0)


def test_what_is_no_spec():
    with pytest.raises(UserError, match="one of ArrayRecords, Arrow, Digits, Jsonl, Megatron, Mixture"):
        open_data("stdlib", seed=0)  # type: ignore[arg-type]


def test_mixture_in_a_mixture_is_refused(tmp_path):
    inner = Mixture(sources=(Stdlib(seq_len=8),), weights=(1.0,))
    with pytest.raises(UserError, match="token sources with the same seq_len"):
        open_data(Mixture(sources=(inner, Stdlib(seq_len=8)), weights=(1.0, 1.0)), seed=0)
