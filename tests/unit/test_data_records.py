"""Sources of records: the documents of every kind of file, by the libraries that write them, and what each says of bad
input. The files hold the same records, so one table serves all kinds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portatrain.data import ArrayRecords, Arrow, DataSpec, Jsonl, Megatron, Parquet, TextFiles, TokenMemmap, open_data
from portatrain.data.corpus import streams
from portatrain.data.finding import find
from portatrain.data.records import RecordDocuments
from portatrain.data.sources import documents
from portatrain.data.store_files import matches
from portatrain.errors import UserError
from portatrain.system import object_store

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
pq = pytest.importorskip("pyarrow.parquet")

Record = dict[str, Any]
GOLDEN = Path(__file__).parents[1] / "golden" / "datasets_on_disk"


def lines(records: list[Record]) -> bytes:
    return b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\r\n" * (1 + n % 2) for n, r in enumerate(records))


def table(records: list[Record]) -> Any:
    names = sorted({key for record in records for key in record}) or ["text"]
    return pa.table({name: pa.array([r.get(name) for r in records]) for name in names})


def _gzip(path: Path, records: list[Record]) -> None:
    raw = lines(records)
    path.write_bytes(gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :]))


def _zstd(path: Path, records: list[Record]) -> None:
    raw, made = lines(records), zstandard.ZstdCompressor()
    path.write_bytes(made.compress(raw[: len(raw) // 3]) + made.compress(raw[len(raw) // 3 :]))


def _parquet(path: Path, records: list[Record]) -> None:
    pq.write_table(table(records), path, row_group_size=3, compression="zstd", write_page_checksum=True)


def _stream(path: Path, records: list[Record]) -> None:
    made = table(records)
    with pa.ipc.new_stream(str(path), made.schema) as out:
        out.write_table(made, max_chunksize=3)


def _file(path: Path, records: list[Record]) -> None:
    made = table(records)
    with pa.ipc.new_file(str(path), made.schema) as out:
        out.write_table(made, max_chunksize=3)


def _array_record(path: Path, records: list[Record]) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:2")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


def _jsonl(path: Path, records: list[Record]) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + lines(records))


KINDS: dict[str, tuple[type[DataSpec], Callable[[Path, list[Record]], None], dict[str, Any]]] = {
    "jsonl": (Jsonl, _jsonl, {}),
    "jsonl.gz": (Jsonl, _gzip, {}),
    "jsonl.zst": (Jsonl, _zstd, {}),
    "parquet": (Parquet, _parquet, {}),
    "arrow stream": (Arrow, _stream, {}),
    "arrow file": (Arrow, _file, {}),
    "array records": (ArrayRecords, _array_record, {"field": "text"}),
}


def spec_of(kind: str, at: Path, **more: Any) -> Any:
    cls, _, fields = KINDS[kind]
    return cls(**{"paths": str(at), "seq_len": 2, "validation": 0, **fields, **more})


def written(kind: str, path: Path, records: list[Record], **more: Any) -> Any:
    KINDS[kind][1](path, records)
    return spec_of(kind, path, **more)


def found(spec: DataSpec) -> list[bytes]:
    """The documents of a source of bytes, sorted."""
    return sorted(np.asarray(d, np.uint8).tobytes() for split in streams(spec, None).values() for d in split)


TEXT = st.one_of(
    st.none(),
    st.sampled_from(["", "\ufeff", "\0", "a\r\nb\r", "\u2028\x85", "{{ n }}", "x" * 70_000]),
    st.text(max_size=12),
)
OTHER = st.fixed_dictionaries({"n": st.integers(-3, 3), "deep": st.fixed_dictionaries({"text": st.text(max_size=3)})})


@given(rows=st.lists(st.tuples(TEXT, OTHER), max_size=8), empty=st.booleans())
@settings(max_examples=12, deadline=None)
def test_random_corpora_are_the_same_documents_in_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str | None, Record]], empty: bool
) -> None:
    records = [{"text": text, **other} for text, other in rows] + [{"text": "enough", "n": 1, "deep": {"text": ""}}]
    want = sorted(r["text"].encode() for r in records if r["text"])
    nested = sorted(f"{r['n']}/{r['deep']['text']}".encode() for r in records)
    folder = tmp_path_factory.mktemp("corpus")
    for kind in KINDS:
        if kind == "array records":
            continue
        here = folder / kind.replace(" ", "-")
        here.mkdir()
        if empty:
            (here / "empty").touch() if kind == "jsonl" else KINDS[kind][1](here / "empty", [])
        spec = written(kind, here / "full", records)
        assert found(spec) == want, kind
        assert found(dataclasses.replace(spec, template="{{ n }}/{{ deep.text }}")) == nested, kind
        nulls = sum(not r["text"] for r in records)
        said = streams(dataclasses.replace(spec, paths=str(here)), None)["train"].passed_over
        told = f"{nulls} document{'s' * (nulls != 1)} without content"
        assert [told in s for s in said if "content" in s] == [True] * bool(nulls)
        assert len(said) == bool(nulls) + empty, said
    # the libraries' own readers of the same files
    assert [r["text"] for r in pq.read_table(folder / "parquet" / "full").to_pylist()] == [r["text"] for r in records]
    assert want == sorted(
        r["text"].encode()
        for r in pa.ipc.open_stream(folder / "arrow-stream" / "full").read_all().to_pylist()
        if r["text"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_document_among_many(tmp_path: Path, kind: str) -> None:
    records = [{"text": f"document {n} \0é "} for n in range(700)]
    records[650] = {"text": "0123456789" * 300_000}
    spec = written(kind, tmp_path / "corpus", records, validation=0.3)
    assert found(spec) == sorted(r["text"].encode() for r in records)
    source = documents(spec)
    assert isinstance(source, RecordDocuments)
    for number in (699, 3, 4, 650, 651, 0, 300):  # in any order, though slowly
        assert source.read(number)[0].tobytes() == records[number]["text"].encode()
    source.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_does_not_depend_on_the_order_of_reading(tmp_path: Path, kind: str) -> None:
    """One corpus has one fingerprint, packed to disk or in memory, wherever it lies."""
    records = [{"text": f"document {n} " * n} for n in range(30)]
    spec = written(kind, tmp_path / "corpus", records, validation=0.3)
    first = open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus").rename(tmp_path / "elsewhere" / "corpus")
    again = open_data(dataclasses.replace(spec, paths=str(tmp_path / "elsewhere")), seed=0)
    assert first.fingerprint == again.fingerprint
    assert open_data(spec, seed=0, pack_dir=tmp_path / "pack").fingerprint == first.fingerprint


def test_whole_records_are_texts(tmp_path: Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    texts = [b"a", b"\xff\0", b"", b"long " * 99]
    writer = module.ArrayRecordWriter(str(tmp_path / "a"), "group_size:3")
    for text in texts:
        writer.write(text)
    writer.close()
    assert found(ArrayRecords(paths=str(tmp_path), seq_len=2, validation=0)) == sorted(filter(None, texts))


def test_binary_columns_are_bytes(tmp_path: Path) -> None:
    made = pa.table({"text": pa.array([b"caf\xe9", None, b"\0\1"], pa.binary())})
    pq.write_table(made, tmp_path / "a.parquet")
    assert found(Parquet(paths=str(tmp_path), seq_len=2, validation=0)) == [b"\0\1", b"caf\xe9"]


def test_columns_of_many_types_and_names(tmp_path: Path) -> None:
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    for kind in kinds:
        made = pa.table({"a.b": pa.array(["one", "two"]).cast(kind), "a": [{"b": "x"}, {"b": "y"}]})
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), made.schema) as out:
            out.write_table(made)
        assert found(Arrow(paths=str(tmp_path / "a.arrow"), seq_len=2, validation=0, field="a.b")) == [b"one", b"two"]
        if kind != pa.string_view():
            pq.write_table(made, tmp_path / "a.parquet")
            got = found(Parquet(paths=str(tmp_path / "a.parquet"), seq_len=2, validation=0, field="a.b"))
            assert got == [b"one", b"two"]


def test_a_dataset_that_the_package_datasets_wrote(tmp_path: Path) -> None:
    """The folder was written by `datasets` 5.2.0: DatasetDict.save_to_disk with two shards for `train`."""
    about = json.loads((GOLDEN / "train" / "state.json").read_text())
    tables = [
        pa.ipc.open_stream(GOLDEN / "train" / row["filename"]).read_all().to_pylist() for row in about["_data_files"]
    ]
    texts = [row["text"] for rows in tables for row in rows]
    assert texts == ["a text", "é\0 and \r\n", None, "", "the last"]
    spec = Arrow(paths=str(GOLDEN / "train"), seq_len=4, validation=0)
    assert found(spec) == sorted(t.encode() for t in texts if t)
    with pytest.raises(UserError, match=r"got a dataset with the splits train, held. Add the split to the path"):
        found(dataclasses.replace(spec, paths=str(GOLDEN)))
    both = open_data(dataclasses.replace(spec, validation_paths=str(GOLDEN / "held")), seed=0)
    assert [d.tobytes() for d in both.streams["validation"]] == [b"the last"]
    for name in ("state.json", "dataset_info.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"):
        (tmp_path / name).write_bytes((GOLDEN / "train" / name).read_bytes())
    (tmp_path / "cache-0.arrow").write_bytes(b"of an earlier map()")
    cached = streams(dataclasses.replace(spec, paths=str(tmp_path)), None)["train"]
    assert [d.tobytes() for d in cached] == [d.tobytes() for d in streams(spec, None)["train"]]
    assert any("cache-0.arrow" in said for said in cached.passed_over)
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow, got 1 of 2"):
        found(dataclasses.replace(spec, paths=str(tmp_path)))


def test_what_the_package_datasets_reads_is_what_we_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["one", None, "\0three", "é" * 5000], "n": [1, 2, 3, 4]})
    made.save_to_disk(str(tmp_path / "arrow"), num_shards=3)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.to_json(str(tmp_path / "a.jsonl"))
    want = sorted(t.encode() for t in datasets.load_from_disk(str(tmp_path / "arrow"))["text"] if t)
    for spec in (
        Arrow(paths=str(tmp_path / "arrow"), seq_len=4, validation=0),
        Parquet(paths=str(tmp_path / "a.parquet"), seq_len=4, validation=0),
        Jsonl(paths=str(tmp_path / "a.jsonl"), seq_len=4, validation=0),
    ):
        assert found(spec) == want


# --- Megatron ----------------------------------------------------------------------------------


def megatron(prefix: Path, documents_: list[list[list[int]]], code: int = 8) -> None:
    """Write documents, each a list of sequences, as Megatron-LM's IndexedDatasetBuilder does."""
    dtype = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    sequences = [np.array(s, dtype) for d in documents_ for s in d]
    prefix.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    offsets, bounds = [0], [0]
    for s in sequences[:-1]:
        offsets.append(offsets[-1] + s.nbytes)
    for d in documents_:
        bounds.append(bounds[-1] + len(d))
    head = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code)
    counts = struct.pack("<QQ", len(sequences), len(bounds))
    lengths = np.array([len(s) for s in sequences], "<i4").tobytes()
    tail = np.array(offsets[: len(sequences)], "<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(head + counts + lengths + tail)


DOCUMENTS = [[[5, 6, 7, 9]], [[1, 2], [3, 9]], [], [[9]], [[4, 9, 4, 4]]]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("named", ["c.bin", "c.idx", "", "*.idx"])
def test_token_files_of_megatron(tmp_path: Path, code: int, named: str) -> None:
    megatron(tmp_path / "c", DOCUMENTS, code)
    spec = Megatron(paths=str(tmp_path / named), seq_len=2, vocab=10, separator=9, validation=0)
    stream = streams(spec, None)["train"]
    assert sorted(d.tolist() for d in stream) == [[1, 2, 3], [4, 9, 4, 4], [5, 6, 7]] and stream.bos == 9
    whole = streams(dataclasses.replace(spec, separator=None), None)["train"]
    assert sorted(d.tolist() for d in whole) == sorted([i for s in d for i in s] for d in DOCUMENTS if d)


def test_the_index_is_believed_and_not_the_separators(tmp_path: Path) -> None:
    megatron(tmp_path / "c", [[[1, 9, 2]], [[3, 9]]])
    (tmp_path / "raw.bin").write_bytes((tmp_path / "c.bin").read_bytes())
    more = {"seq_len": 2, "vocab": 10, "separator": 9, "validation": 0}
    assert sorted(d.tolist() for d in streams(Megatron(paths=str(tmp_path / "c.bin"), **more), None)["train"]) == [
        [1, 9, 2],
        [3],
    ]
    raw = streams(TokenMemmap(paths=str(tmp_path / "raw.bin"), **more), None)["train"]  # as nanoGPT writes them
    assert sorted(d.tolist() for d in raw) == [[1], [2, 3]]


def _index(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / "c.idx").read_bytes())
        change(data)
        (folder / "c.idx").write_bytes(bytes(data))

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda at: (at / "c.idx").unlink(), r"c.idx beside it, got no such file"),
        (lambda at: (at / "c.bin").unlink(), r"c.bin beside it"),
        (lambda at: (at / "c.bin").write_bytes(b"12"), "got 2 bytes. The file was cut"),
        (_index(lambda d: d.__setitem__(0, 0)), "got a file without its mark"),
        (_index(lambda d: d.__setitem__(9, 7)), "got version 7"),
        (_index(lambda d: d.__setitem__(17, 7)), "ids of type 7"),
        (_index(lambda d: d.__delitem__(slice(-4, None))), "bytes in place of"),
        (_index(lambda d: d.extend(bytes(5))), "multimodal"),
        (_index(lambda d: d.__setitem__(34 + 20, 4)), "overlap or leave gaps"),
        (_index(lambda d: d.__setitem__(-1, 1)), "bounds of documents"),
        (lambda at: megatron(at / "c", [[[1, 10]]]), "got 10. Set vocab"),
        (lambda at: megatron(at / "c", [[[1, -1]]], 4), "got -1"),
    ],
)
def test_bad_pairs_of_megatron(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    megatron(tmp_path / "c", DOCUMENTS)
    change(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        found(Megatron(paths=str(tmp_path), seq_len=2, vocab=10, separator=9, validation=0))
    assert "\n" not in str(caught.value)


# --- bad input ---------------------------------------------------------------------------------

RECORDS = [{"text": f"some text {n}", "n": n} for n in range(20)]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


BAD: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    ("jsonl.gz", _cut, {}, "expected whole gzip data, got Compressed file ended"),
    ("jsonl.gz", _flip, {}, "expected whole gzip data|one JSON object"),
    ("jsonl.zst", _cut, {}, "expected whole zstd data, got an end within a frame"),
    ("parquet", _cut, {}, "expected a whole Parquet file, got Parquet magic bytes"),
    ("parquet", _flip, {}, "expected a whole Parquet file"),
    ("parquet", lambda p: p.write_text("text " * 9), {}, "expected a whole Parquet file"),
    ("parquet", lambda p: p.write_bytes(b""), {}, "expected a whole Parquet file"),
    ("arrow stream", _cut, {}, "expected an Arrow file, or an Arrow stream with its mark of the end"),
    ("arrow file", _cut, {}, "expected a whole Arrow file"),
    ("array records", _cut, {}, "expected a whole ArrayRecord file"),
    ("array records", lambda p: p.write_text("text " * 999), {}, "expected a whole ArrayRecord file"),
    *(
        (kind, lambda p: None, more, said)
        for kind in KINDS
        for more, said in (
            ({"field": "txt"}, "'txt'. Did you mean text"),
            ({"field": "n"}, r"(line|row|record) \d+, field 'n': expected a string, got int"),
            ({"template": "{{ text"}, "template: expected a Jinja template that renders, got TemplateSyntaxError"),
            ({"template": "text"}, "which has no field"),
            ({"template": "{{ n / 0 }}"}, r"(line|row|record) \d+: .*ZeroDivisionError"),
            ({"template": "{{ n }}{{ nothing }}"}, "'nothing' is undefined"),
            ({"template": "{{ none }}{{ n }}"}, "a field that is null; write {{ name or '' }}"),
            ({"template": "{{ n.__class__.__mro__ }}"}, "SecurityError"),
            ({"template": "{{ text }}", "messages": "n"}, "expected one of them, got both"),
            ({"chat_template": "x"}, "expected None, since documents are no chats"),
            ({"messages": "n"}, "neither a tokenizer nor chat_template"),
            ({"tokenizer": "nowhere"}, "tokenizer nowhere"),
            ({"paths": ""}, "none: this recipe comes without data"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "change", "more", "said"), BAD)
def test_bad_input_ends_in_one_paragraph(
    tmp_path: Path, kind: str, change: Callable[[Path], object], more: dict[str, Any], said: str
) -> None:
    written(kind, tmp_path / "corpus", RECORDS)
    change(tmp_path / "corpus")
    with pytest.raises(UserError, match=said) as caught:
        open_data(spec_of(kind, tmp_path / "corpus", **more), seed=0, pack_dir=tmp_path / "pack")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"text": "a", "text": "b"}', "line 1: .*the key 'text' twice"),
        (b'{"text": "a"}\n{"text": "a", "m": {"x": 1, "x": 1}}', "line 2: .*the key 'x' twice"),
        (b'{"text": "a"}\n' + b"[" * 200_000, "line 2: .*nested too deep"),
        (b'{"text": "caf\xe9"}', "line 1: expected one JSON object"),
        (b'{"text": "a"}\n\n7', "line 3: expected one JSON object, got int"),
        (b'{"text": "\\ud800"}', "expected text that UTF-8 can encode"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda raw: zstandard.ZstdCompressor().compress(raw)])
def test_bad_lines_are_named(tmp_path: Path, raw: bytes, said: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a").write_bytes(pack(raw))
    with pytest.raises(UserError, match=said) as caught:
        found(Jsonl(paths=str(tmp_path), seq_len=1, validation=0))
    assert str(tmp_path / "a") in str(caught.value)


def test_text_that_is_not_utf_8_in_a_column_of_text(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], "<i4").tobytes()), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "a")
    with pytest.raises(UserError, match=r"a, row 1: expected text in UTF-8"):
        found(Parquet(paths=str(tmp_path), seq_len=1, validation=0))
    with pytest.raises(UserError, match="expected one column of that name, got 2"):
        pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a")
        found(Parquet(paths=str(tmp_path), seq_len=1, validation=0))


# --- stores ------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the store below s3://bucket, by obstore's own store of files."""
    obstore = pytest.importorskip("obstore")
    folder = tmp_path / "bucket"
    folder.mkdir()

    def connect(url: str, options: object) -> Any:
        below = folder / url.removeprefix("s3://bucket").strip("/")
        return obstore.store.LocalStore(prefix=str(below), mkdir=not below.exists() and not below.is_file())

    monkeypatch.setattr(object_store, "connect", connect)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_sources_in_a_store(tmp_path: Path, bucket: Path, kind: str) -> None:
    deep = bucket / "data" / "deep"
    deep.mkdir(parents=True)
    local = [written(kind, deep / name, [{"text": f"{name} {n} \0é" * n} for n in range(9)]) for name in ("a.x", "b.x")]
    want = sorted(d for spec in local for d in found(spec))
    for tail in ("data", "data/deep/", "data/**", "data/**/*.x", "data/*/[ab].x", "**/?.x"):
        spec = dataclasses.replace(local[0], paths=f"s3://bucket/{tail}")
        assert found(spec) == want, tail
    one = dataclasses.replace(local[0], paths="s3://bucket/data/deep/a.x")
    assert found(one) == found(local[0])
    for nowhere in ("s3://bucket/none", "s3://bucket/data/*.y"):
        with pytest.raises(UserError, match=r"where there is none\. Check the URL"):
            found(dataclasses.replace(one, paths=nowhere))
    held = open_data(dataclasses.replace(one, validation_paths="s3://bucket/data/deep/b.x"), seed=0)
    here = dataclasses.replace(one, paths=str(deep / "a.x"), validation_paths=str(deep / "b.x"))
    assert held.fingerprint == open_data(here, seed=0).fingerprint


def test_of_a_table_in_a_store_only_the_column_is_read(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = np.random.default_rng(0).bytes(24 << 20)
    pieces = [rest[n << 20 : (n + 1) << 20] for n in range(24)]
    rows = pa.table({"rest": pieces, "text": [f"text {n}" for n in range(24)]})
    pq.write_table(rows, bucket / "a.parquet", row_group_size=12, compression="none")
    read: list[int] = []
    real = object_store.Objects.range
    monkeypatch.setattr(
        object_store.Objects, "range", lambda self, name, at, size: read.append(size) or real(self, name, at, size)
    )
    spec = Parquet(paths="s3://bucket/a.parquet", seq_len=2, validation=0)
    assert found(spec) == sorted(f"text {n}".encode() for n in range(24))
    assert sum(read) < 1 << 20, read


def test_other_sources_in_a_store(bucket: Path) -> None:
    (bucket / "a.txt").write_bytes(b"a text")
    assert found(TextFiles(paths="s3://bucket/a.txt", seq_len=2, validation=0)) == [b"a text"]
    np.arange(9, dtype="<u2").tofile(bucket / "ids.bin")
    more = {"seq_len": 2, "vocab": 10, "validation": 0}
    assert found(TokenMemmap(paths="s3://bucket/*.bin", **more)) == [bytes(range(9))]
    megatron(bucket / "c", DOCUMENTS)
    local = found(Megatron(paths=str(bucket / "c.idx"), **more))
    for name in ("c.bin", "c.idx", "c.*"):
        assert found(Megatron(paths=f"s3://bucket/{name}", **more)) == local
    (bucket / "bad.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match=r"token file s3://bucket/bad.bin: expected a whole number"):
        found(TokenMemmap(paths="s3://bucket/bad.bin", **more))
    with pytest.raises(UserError, match=r"expected a folder, or a URL of an object store"):
        found(TextFiles(paths="http://bucket/a.txt", seq_len=2))


@given(
    parts=st.lists(st.sampled_from(["a", "b.x", ".h", "ab"]), min_size=1, max_size=4),
    patterns=st.lists(st.sampled_from(["**", "*", "a*", "?", "*.x", ".*"]), min_size=1, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_globs_in_a_store_are_those_on_disk(parts: list[str], patterns: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root).joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        try:
            local = [name for name, _ in find(str(Path(root).joinpath(*patterns)), "x")]
        except UserError:
            local = []
    assert matches(tuple(parts), tuple(patterns)) == (local == ["/".join(parts)])
