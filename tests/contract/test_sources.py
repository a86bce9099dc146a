"""Every data source in a run: trained, evaluated, planned, reported and seen by the shipped hooks."""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.data import (
    ArrayRecords,
    Arrow,
    DataSpec,
    Digits,
    Jsonl,
    Megatron,
    Mixture,
    PackedTokens,
    Parquet,
    Preferences,
    Stdlib,
    TextFiles,
    TokenMemmap,
    open_data,
)
from portatrain.data import pack as packs
from portatrain.data.open import blank_batch
from portatrain.errors import StorageError, UserError
from portatrain.optim import AdamW, Constant
from portatrain.plan.cost.recipes import shape_of
from portatrain.recipe import Recipe
from portatrain.runs.history import read_history
from portatrain.runs.report.page import page
from portatrain.runs.run_dir import RunDir
from portatrain.system.json_files import number
from portatrain.training.hooks import TextSample, TrigramBaseline
from portatrain.training.trainer import train
from recipes.models.decoder import DecoderConfig
from recipes.models.preference import REFERENCE, DPOConfig
from recipes.models.vit import ViTConfig
from tests.support.packed import packed

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the table trains on torch")

ACME = Path(__file__).parents[1] / "plugins" / "acme"
DECODER = DecoderConfig(vocab=256, embed=16, layers=1, heads=2)
BYTES, IDS, IMAGES = "bytes", "ids", "images"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"{n} and {n} make {2 * n}.\n" * 8)
        np.full(90, n, "<u2").tofile(tmp_path / f"{n}.bin")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(12)))
    return tmp_path


def of(source: str, at: Path) -> tuple[DataSpec, object, str]:
    """Return (data, a model for it, what its samples are)."""
    from acme_lab.data import LineConfig, Lines, Sums

    text = TextFiles(paths=str(at / "corpus"), seq_len=16, validation=0.3)
    lines = Jsonl(paths=str(at / "lines.jsonl"), seq_len=16, validation=0.3)

    def store(of: DataSpec, name: str) -> DataSpec:
        packed(of, at / name)
        return PackedTokens(path=str(at / name), seq_len=16)

    made: dict[str, Callable[[], tuple[DataSpec, object, str]]] = {
        "TextFiles": lambda: (text, DECODER, BYTES),
        "Jsonl": lambda: (lines, DECODER, BYTES),
        **{name: lambda name=name: (_records(name, at), DECODER, BYTES) for name in RECORDS},
        "Megatron": lambda: (_megatron(at), DECODER, IDS),
        "best-fit": lambda: (replace(text, packing="best-fit"), DECODER, BYTES),
        "single": lambda: (replace(lines, packing="single"), DECODER, BYTES),
        "chat": lambda: (_chat(at), DECODER, BYTES),
        "Stdlib": lambda: (Stdlib(seq_len=16, validation=0.01), DECODER, BYTES),
        "TokenMemmap": lambda: (
            TokenMemmap(paths=str(at / "*.bin"), seq_len=16, vocab=256, validation=0.3),
            DECODER,
            IDS,
        ),
        "Mixture": lambda: (Mixture(sources=(text, lines, Sums(seq_len=16)), weights=(1.0, 1.0, 1.0)), DECODER, BYTES),
        "PackedTokens": lambda: (store(text, "text"), DECODER, BYTES),
        "Mixture of stores": lambda: (
            Mixture(sources=(store(text, "text"), store(lines, "lines")), weights=(2.0, 1.0)),
            DECODER,
            BYTES,
        ),
        "Preferences": lambda: (_pairs(at), DPOConfig(policy=DECODER), BYTES),
        "own documents": lambda: (Sums(seq_len=16), DECODER, BYTES),
        "own arrays": lambda: (Lines(), LineConfig(), IMAGES),
        "Digits": lambda: (
            Digits(),
            ViTConfig(rows=8, columns=8, channels=1, patch=4, classes=10, embed=16, layers=1, heads=2),
            IMAGES,
        ),
    }
    return made[source]()


RECORDS = ("Jsonl.gz", "Jsonl.zst", "Parquet", "Arrow", "ArrayRecords")
SOURCES = ["TextFiles", "Jsonl", "Stdlib", "TokenMemmap", "Mixture", "own documents", "own arrays", "Digits"]
SOURCES += [*RECORDS, "Megatron", "best-fit", "single", "chat", "Preferences", "PackedTokens", "Mixture of stores"]


def _records(name: str, at: Path) -> DataSpec:
    """Write the records of lines.jsonl as another kind of file; return its spec."""
    raw = (at / "lines.jsonl").read_bytes()
    path, fields = at / name, {"paths": str(at / name), "seq_len": 16, "validation": 0.3}
    if name == "Jsonl.gz":
        path.write_bytes(gzip.compress(raw))
        return Jsonl(**fields)
    if name == "Jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(raw))
        return Jsonl(**fields)
    if name == "ArrayRecords":
        writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter(str(path), "")
        for line in raw.splitlines():
            writer.write(line)
        writer.close()
        return ArrayRecords(field="text", **fields)
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": [json.loads(line)["text"] for line in raw.splitlines()]})
    if name == "Parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=5)
        return Parquet(**fields)
    with pa.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=5)
    return Arrow(**fields)


def _megatron(at: Path) -> DataSpec:
    ids = np.repeat(np.arange(12), 90).astype("<u2")
    ids.tofile(at / "ids.bin")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 12, 13) + np.full(12, 90, "<i4").tobytes()
    bounds = np.arange(13, dtype="<i8")
    (at / "ids.idx").write_bytes(head + (bounds[:-1] * 180).tobytes() + bounds.tobytes())
    return Megatron(paths=str(at / "ids.idx"), seq_len=16, vocab=256, validation=0.3)


def _chat(at: Path) -> DataSpec:
    (at / "chat.jinja").write_text("{% for m in messages %}{{ m.role[0] + m.content }}\n{% endfor %}")
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}! " * 9}] for n in range(12)]
    (at / "chat.jsonl").write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    paths, template = str(at / "chat.jsonl"), str(at / "chat.jinja")
    return Jsonl(paths=paths, seq_len=16, validation=0.3, messages="chat", chat_template=template)


def _pairs(at: Path) -> DataSpec:
    template = _chat(at).chat_template  # type: ignore[attr-defined]
    asked = [{"role": "user", "content": "?"}]
    sides = ([[*asked, {"role": "assistant", "content": text * n}] for text in "ab"] for n in (1, 2))
    (at / "pairs.jsonl").write_text("".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in [*sides] * 16))
    return Preferences(paths=str(at / "pairs.jsonl"), seq_len=16, validation=0.3, chat_template=template)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_in_a_run(source: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ACME))
    data, model, kind = of(source, corpus)
    single = "Mixture" not in source and source != "Preferences"  # one stream of bytes
    hooks = (TextSample(prompt="1 ", length=3), *((TrigramBaseline(),) if single else ()))
    recipe = Recipe(
        name="table",
        model=model,  # type: ignore[arg-type]
        data=data,
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        steps=2,
        batch=4,
        eval_every=1,
        eval_batches=1,
        frozen=(REFERENCE,) if source == "Preferences" else (),
    )
    run = RunDir(corpus / "run")
    if kind == BYTES:
        recipe = replace(recipe, hooks=hooks)
    else:
        for hook in hooks:
            with pytest.raises(UserError, match=f"hook {type(hook).__name__} of recipe table: expected text"):
                train(replace(recipe, hooks=(hook,)), run, backend="torch")
            assert not run.path.exists()
    assert train(recipe, run, backend="torch") == 0
    tokens = 1 if kind == IMAGES else 16
    assert [row["tokens"] for row in run.curve()] == [4 * tokens, 8 * tokens]
    assert [e["step"] for e in run.events("eval")] == [1, 2] and all(e["samples"] == 4 for e in run.events("eval"))
    (start,) = run.events("start")
    unit = "samples" if kind == IMAGES else "tokens"
    assert start["unit"] == unit and (start["flops_per_step"] is None) == (source == "own arrays")
    assert f"{unit} a second" in page(read_history(run), [])
    shape = shape_of(recipe)
    assert shape.batch == 4 and (kind == IMAGES or shape.seq_len == 16)
    summary = run.summary()
    assert not run.events("hook_failed") and (kind == BYTES) == ("sample" in summary)
    assert ("references" in summary) == (kind == BYTES and single)
    blank = {k: (v.shape, v.dtype) for k, v in blank_batch(data, 3).items()}
    batch = open_data(data, seed=0).train.batch(0, 3)
    assert blank == {k: (v.shape, v.dtype) for k, v in batch.items()}


def small(data: DataSpec, **more: object) -> Recipe:
    fields = {"optimizer": AdamW(lr=1e-3), "schedule": Constant(), "steps": 4, "batch": 4, **more}
    return Recipe(name="small", model=DECODER, data=data, **fields)  # type: ignore[arg-type]


def test_what_a_source_passes_over_is_told_in_every_attempt(corpus: Path) -> None:
    (corpus / "corpus" / "gone.txt").symlink_to("nowhere")
    (corpus / "corpus" / "empty.txt").touch()
    run = RunDir(corpus / "run")
    recipe = small(TextFiles(paths=str(corpus / "corpus"), seq_len=16, validation=0))
    assert train(recipe, run, backend="torch", stop_at=1) == 85
    assert train(recipe, run, backend="torch", stop_at=2) == 85
    told = [(e["attempt"], e["what"]) for e in run.events("warning")]
    assert [n for n, _ in told] == [1, 1, 2, 2]
    said = " ".join(what for _, what in told[:2])
    assert "1 document without content: empty.txt" in said and "gone.txt" in said


def test_a_batch_without_a_target_is_skipped_and_an_evaluation_of_none_has_no_loss(corpus: Path) -> None:
    data = replace(_chat(corpus), chat_template=str(corpus / "chat.jinja"))  # type: ignore[call-arg]
    rows = [[{"role": "user", "content": "q" * 70}, {"role": "assistant", "content": "a" * 30}]] * 12
    (corpus / "chat.jsonl").write_text("".join(json.dumps({"chat": row}) + "\n" for row in rows))
    run = RunDir(corpus / "run")
    assert train(small(data, batch=1, steps=12, eval_every=12, eval_batches=1), run, backend="torch") == 0
    targets = [float(open_data(data, seed=0).train.batch(n, 1)["mask"].sum()) for n in range(12)]
    lost = [math.isnan(row["loss"]) for row in run.curve()]
    assert lost == [count == 0 for count in targets] and True in lost and False in lost
    assert [row["skipped"] for row in run.curve()] == lost
    (found,) = run.events("eval")[:1]
    assert math.isnan(number(found["loss"]))  # the first window of the validation split is a question


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_large_corpus_with_flipped_bytes_is_not_trained_on(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    monkeypatch.setattr(packs, "VERIFY_BYTES", 0)
    run = RunDir(corpus / "run")
    recipe = small(TextFiles(paths=str(corpus / "corpus"), seq_len=16, validation=0.3), eval_every=4)
    assert train(recipe, run, backend="torch", stop_at=1) == 85
    tokens = run.path / "data" / f"{split}-tokens.bin"
    tokens.write_bytes(bytes(b ^ 1 for b in tokens.read_bytes()))
    # No window of the validation split is read before the end: the thread finds the damage.
    monkeypatch.setattr(packs.Verification, "start", lambda self: (self._thread.start(), self._thread.join()))
    with pytest.raises(UserError, match="CRC-32" if split == "train" else "SHA-256"):
        train(recipe, run, backend="torch")
    assert [row["step"] for row in run.curve()] == [1]


def test_a_run_on_a_store_leaves_it_where_it_is_and_ends_as_storage_when_it_is_damaged(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portatrain.data.store.reading.AGAIN_AFTER_S", (0.01,))
    text = TextFiles(paths=str(corpus / "corpus"), seq_len=16, validation=0.3)
    packed(text, corpus / "store")
    run, same = RunDir(corpus / "run"), RunDir(corpus / "same")
    recipe = small(PackedTokens(path=str(corpus / "store"), seq_len=16))
    assert train(recipe, run, backend="torch", stop_at=2) == 85
    assert not (run.path / "data").exists()
    (corpus / "store").rename(corpus / "away")
    with pytest.raises(UserError, match="none there"):
        train(recipe, run, backend="torch")
    (corpus / "away").rename(corpus / "store")
    shard = corpus / "store" / "train-00000.tokens"
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(StorageError, match=r"train-00000\.tokens"):
        train(recipe, run, backend="torch")
    shard.write_bytes(good)
    assert train(recipe, run, backend="torch") == 0
    assert train(small(text), same, backend="torch") == 0
    # The store gives the samples of a run that packs its source itself.
    assert [row["loss"] for row in run.curve()] == [row["loss"] for row in same.curve()]
