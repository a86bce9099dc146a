"""Packed stores: the stream that a run packs itself, in shards, and refused when something is amiss."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.data import (
    DataSpec,
    Jsonl,
    Mixture,
    PackedTokens,
    TextFiles,
    TokenMemmap,
    batch_hash,
    open_data,
    prefetch,
)
from portatrain.data.corpus import streams
from portatrain.data.encode import Tokenized
from portatrain.data.store import encoders, packing, reading
from portatrain.data.store.layout import TOKENS, Manifest, SplitFacts, block_dtype, parse
from portatrain.data.text_batches import Windows
from portatrain.errors import StorageError, UserError
from portatrain.runs.claim import Claim
from tests.support.packed import RECIPE, contents, corpus, packed, tokenizer


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    corpus(root / "corpus")
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * (n % 9)}) + "\n" for n in range(400)))
    (root / "lines.jsonl.gz").write_bytes(gzip.compress((root / "lines.jsonl").read_bytes()))
    (root / "chat.jinja").write_text("{% for m in messages %}{{ m.role[0] + m.content }}\n{% endfor %}")
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}! " * 99}] for n in range(99)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"chat": one}) + "\n" for one in chats))
    (np.arange(30_000) % 97).astype("<u2").tofile(root / "ids.bin")
    tokenizer(root / "tokenizer.json")
    return root


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages(DataSpec):
    """Texts that code makes."""

    seq_len: int
    tokenizer: str
    validation: float = 0.2
    words: str = "w5 w6é "

    def documents(self) -> list[tuple[str, str]]:
        return [(f"page {n}", self.words * (n % 13)) for n in range(90)]


def specs(at: Path) -> dict[str, DataSpec]:
    text = TextFiles(paths=str(at / "corpus"), seq_len=16, validation=0.2)
    return {
        "bytes": text,
        "tokenizer": dataclasses.replace(text, tokenizer=str(at / "tokenizer.json")),
        "lines": Jsonl(paths=str(at / "lines.jsonl"), seq_len=16, validation=0.1),
        "in order": Jsonl(paths=str(at / "lines.jsonl.gz"), seq_len=16, validation=0.3),
        "chats": Jsonl(
            paths=str(at / "chats.jsonl"),
            seq_len=16,
            validation=0.3,
            messages="chat",
            chat_template=str(at / "chat.jinja"),
        ),
        "own": Pages(seq_len=16, tokenizer=str(at / "tokenizer.json")),
        "ids": TokenMemmap(paths=str(at / "ids.bin"), seq_len=16, vocab=70_000 - 5000, separator=7, validation=0.1),
        "nothing held out": dataclasses.replace(text, validation=0),
    }


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "AGAIN_AFTER_S", (0.01, 0.01))


@pytest.mark.parametrize("kind", ["bytes", "tokenizer", "lines", "in order", "chats", "own", "ids", "nothing held out"])
def test_a_store_holds_the_stream_that_a_run_packs(kind: str, at: Path, tmp_path: Path) -> None:
    spec = specs(at)[kind]
    want = open_data(spec, seed=3)
    made = packed(spec, tmp_path / "store")
    store = PackedTokens(path=str(tmp_path / "store"), seq_len=16, fingerprint=made.fingerprint)
    got = open_data(store, seed=3)
    assert set(got.streams) == set(want.streams) and (got.vocab, got.bytes_per_target) == (
        want.vocab,
        want.bytes_per_target,
    )
    for split, stream in want.streams.items():
        mine = got.streams[split]
        assert np.array_equal(mine.tokens, stream.tokens) and np.array_equal(mine.starts, stream.starts)
        assert all(np.array_equal(a, b) for a, b in zip(mine, stream, strict=True))
        assert (mine.bytes, mine.passed_over) == (stream.bytes, stream.passed_over)
        assert np.array_equal(mine.read(5, 50), stream.read(5, 50))
    assert batch_hash(got.train.batch(11, 50)) == batch_hash(want.train.batch(11, 50))
    if want.validation is not None:
        assert batch_hash(got.validation.batch(0, 30)) == batch_hash(want.validation.batch(0, 30))
    assert not list((tmp_path / "store").glob("unfinished/state*"))
    # The shards, read by NumPy alone.
    shards = sorted((tmp_path / "store").glob("train-*.tokens"))
    blocks = np.concatenate([np.memmap(p, made.block(), mode="r") for p in shards])
    assert np.array_equal(blocks["tokens"].reshape(-1)[: made.splits["train"].tokens], want.streams["train"].tokens)
    assert all(zlib.crc32(b.tobytes()[:-4]) == b["crc"] for b in blocks)


def test_the_number_of_workers_and_the_size_of_chunks_change_nothing(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 7)
    spec = specs(at)["tokenizer"]
    one = packed(spec, tmp_path / "1", workers=1)
    monkeypatch.setattr(packing, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(packing, "SAVE_S", 0.0)
    packed(spec, tmp_path / "3", workers=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") and one.splits["train"].groups > 5
    # Groups are cut by their bytes, too; every document is there once.
    monkeypatch.setattr(packing, "GROUP_BYTES", 5000)
    by_bytes = packed(spec, tmp_path / "b")
    assert by_bytes.splits["train"].groups > one.splits["train"].groups
    documents = [
        sorted(
            d.tobytes() for d in open_data(PackedTokens(path=str(tmp_path / p), seq_len=16), seed=0).streams["train"]
        )
        for p in "1b"
    ]
    assert documents[0] == documents[1] == sorted(d.astype(np.uint16).tobytes() for d in streams(spec, None)["train"])


def test_groups_keep_the_order_of_the_source_and_validation_is_read_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 10)
    for n in range(60):
        folder = tmp_path / "text" / ("held" if n >= 30 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.txt").write_bytes(bytes([40 + n]) * 40)
    spec = TextFiles(
        paths=str(tmp_path / "text" / "train"),
        validation_paths=str(tmp_path / "text" / "held"),
        seq_len=8,
        validation=0,
    )
    packed(spec, tmp_path / "store")
    data = open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=8), seed=0)
    mine = [int(d[0]) for d in data.streams["train"]]
    names = sorted(p.name for p in (tmp_path / "text" / "train").iterdir())
    firsts = [(tmp_path / "text" / "train" / name).read_bytes()[0] for name in names]
    assert [set(mine[i : i + 10]) for i in (0, 10, 20)] == [set(firsts[i : i + 10]) for i in (0, 10, 20)]
    assert mine != firsts
    held = data.validation
    assert held is not None
    begins = held._order(np.arange(held.windows)).tolist()
    assert sorted(begins) == list(range(held.windows)) and begins != sorted(begins)
    again = open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=8), seed=9).validation
    assert again is not None and again._order(np.arange(held.windows)).tolist() == begins


class Killed(BaseException):
    """As if the process had been killed: nothing after it runs but what a test needs."""


def test_packing_goes_on_from_every_write(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before or after each write to a disk in turn, and goes on to the same bytes."""
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 15)
    monkeypatch.setattr(packing, "SAVE_S", 0.0)
    spec = specs(at)["bytes"]
    packed(spec, tmp_path / "whole")
    from portatrain.data.store import places, stream_writer

    count = 0

    def dying(call, when: int, before: bool):
        def wrapped(*args, **more):
            nonlocal count
            count += 1
            if count == when and before:
                raise Killed
            out = call(*args, **more)
            if count == when:
                raise Killed
            return out

        return wrapped

    write, commit, sync = stream_writer.StreamWriter._write, places.Folder.commit, stream_writer.StreamWriter._sync
    when = deaths = 0
    while True:
        when += 1
        died = False
        for before in (True, False):
            count = 0
            with monkeypatch.context() as patch:
                patch.setattr(stream_writer.StreamWriter, "_write", dying(write, when, before))
                patch.setattr(stream_writer.StreamWriter, "_sync", dying(sync, when, before))
                patch.setattr(places.Folder, "commit", dying(commit, when, before))
                try:
                    packed(spec, tmp_path / f"{when}{before}")
                except Killed:
                    died, deaths = True, deaths + 1
            packed(spec, tmp_path / f"{when}{before}")
            assert contents(tmp_path / f"{when}{before}") == contents(tmp_path / "whole"), (when, before)
        if not died:
            break
    assert deaths > 20


def test_an_unfinished_store_goes_on_only_with_the_same_source(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 7)
    monkeypatch.setattr(packing, "SAVE_S", 0.0)
    source = corpus(tmp_path / "corpus", documents=30)
    spec = TextFiles(paths=str(source), seq_len=16, validation=0.2)
    (source / "021.txt").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"021\.txt.*byte 0"):
        packed(spec, tmp_path / "store")
    with pytest.raises(UserError, match=r"unfinished store.*the same documents"):
        (source / "021.txt").write_bytes(b"mended")
        packed(spec, tmp_path / "store")
    (source / "021.txt").write_bytes(b"m")  # as many bytes as before
    with pytest.raises(UserError, match=r"unfinished store.*fields.*validation"):
        packed(dataclasses.replace(spec, validation=0.3), tmp_path / "store")
    with pytest.raises(UserError, match=r"unfinished store.*size of shards"):
        packed(spec, tmp_path / "store", shard_bytes=10**6)
    with pytest.raises(UserError, match=r"not whole yet.*Go on"):
        open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=16), seed=0)
    packed(spec, tmp_path / "store")
    packed(spec, tmp_path / "again")
    assert contents(tmp_path / "store") == contents(tmp_path / "again")
    with pytest.raises(UserError, match=r"packed store.*validation=0\.3"):
        packed(dataclasses.replace(spec, validation=0.3), tmp_path / "store")


def test_no_space_in_the_middle_is_one_paragraph_and_goes_on(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GROUP_DOCUMENTS", 15)
    spec = specs(at)["bytes"]
    from portatrain.data.store import stream_writer

    sync, left = stream_writer.StreamWriter._sync, 2

    def full(self):
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device", "train-00001.tokens")
        sync(self)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"No space left.*train-00001.*continues"):
        patch.setattr(stream_writer.StreamWriter, "_sync", full)
        packed(spec, tmp_path / "store")
    packed(spec, tmp_path / "store")
    packed(spec, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_flipped_bit_is_named_by_verify_and_ends_an_attempt_as_storage(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = packed(specs(at)["bytes"], tmp_path / "store")
    spec = PackedTokens(path=str(tmp_path / "store"), seq_len=16)
    data = open_data(spec, seed=0)
    size = block_dtype("uint8").itemsize
    shard = tmp_path / "store" / "train-00001.tokens"
    good = shard.read_bytes()
    for flipped in (0, TOKENS + 5, size - 1, len(good) - 1):  # ids, starts, sums
        shard.write_bytes(good[:flipped] + bytes([good[flipped] ^ 16]) + good[flipped + 1 :])
        assert main(["data", "verify", str(tmp_path / "store")]) == 1
        said = capsys.readouterr().out
        block = flipped // size
        assert f"shard train-00001.tokens: another CRC-32 than was written, in bytes {block * size:,}" in said
        assert "train-00000" not in said
        stream = data.streams["train"]
        with pytest.raises(StorageError, match=rf"train-00001\.tokens .*in block {block}, 3 times"):
            stream.read((made.shard_blocks + block) * TOKENS, (made.shard_blocks + block) * TOKENS + 9)
        assert "is tried again" in capsys.readouterr().err
    shard.write_bytes(good[:-1])
    assert main(["data", "verify", str(tmp_path / "store")]) == 1
    assert f"{len(good) - 1:,} bytes instead of {len(good):,}" in capsys.readouterr().out
    shard.unlink()
    with pytest.raises(StorageError, match=r"train-00001\.tokens cannot be read.*No such file"):
        stream.read(made.shard_blocks * TOKENS, made.shard_blocks * TOKENS + 9)
    (tmp_path / "store" / "train-00000.tokens").write_bytes(b"")
    assert main(["data", "verify", str(tmp_path / "store"), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert "train-00000" in row["problem"] and "train-00001" in row["problem"]
    shard.write_bytes(good)
    assert len(stream.read(made.shard_blocks * TOKENS, made.shard_blocks * TOKENS + 9)) == 9  # it is read again


SIZE = 47
"""Targets of a window: no divisor of a shard, so that windows lie across both of its ends."""


@pytest.mark.parametrize("kind", ["bytes", "chats"])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_shard_that_is_skipped_is_blank_and_all_else_as_it_was(
    kind: str, number: int, at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = packed(specs(at)[kind], tmp_path / "store", shard_bytes=20_000)
    store = PackedTokens(path=str(tmp_path / "store"), seq_len=SIZE)
    shards = sorted((tmp_path / "store").glob("train-*.tokens"))
    assert len(shards) > 2
    whole = open_data(store, seed=4).train
    windows = np.arange(whole.windows)
    before = whole.batch(0, whole.windows)
    lost = shards[number]
    lost.unlink()
    skipping = dataclasses.replace(store, skip_shards=(lost.name,))
    data = open_data(skipping, seed=4)
    after = data.train.batch(0, whole.windows)
    span = made.shard_blocks * TOKENS
    first = shards.index(lost) * span
    # (windows, S + 1): which tokens of each window are lost
    at_token = whole._order(windows)[:, None] * SIZE + np.arange(SIZE + 1)
    gone = (first <= at_token) & (at_token < first + span) & (at_token < made.splits["train"].tokens)
    assert gone.any() and not gone.all()
    assert np.array_equal(after["sample"], before["sample"])
    for key, there in (("tokens", gone[:, :-1]), ("targets", gone[:, 1:])):
        assert np.array_equal(after[key], np.where(there, 0, before[key]))
    assert np.array_equal(after["mask"], before["mask"] * ~gone[:, 1:] * ~gone[:, :-1])
    cut_before, cut_after = (np.diff(b["segment_ids"], axis=1) != 0 for b in (before, after))
    inner = ~gone[:, :-2] & ~gone[:, 1:-1]
    assert np.array_equal(cut_after[inner], cut_before[inner])  # documents are apart where they were
    edge = gone[:, :-2] != gone[:, 1:-1]
    inside = after["segment_ids"][:, 1:] > 0
    assert cut_after[edge & inside].all() and (edge & inside).any()  # and the blank is apart from both sides
    restarts = np.where(after["segment_ids"] > 0, np.arange(SIZE) - after["positions"], -1)
    assert (after["positions"][:, 1:][cut_after & inside] == 0).all() and restarts.max() < SIZE
    rows = np.arange(40) % 3 == 0
    part = data.train.part(7, 40, rows)  # a process that reads its own rows
    whole_part = data.train.batch(7, 40)
    assert all(np.array_equal(part[key][rows], whole_part[key][rows]) for key in part)
    (said,) = data.passed_over[-1:]
    tokens = min(span, made.splits["train"].tokens - first)
    assert f"1 shard of train skipped by choice ({lost.name}): {tokens} of" in said
    assert data.train.fingerprint == whole.fingerprint
    with pytest.raises(StorageError, match=f"data.skip_shards={lost.name}"):
        open_data(store, seed=4).train.batch(0, whole.windows)
    with pytest.raises(UserError, match="train-00099"):
        open_data(dataclasses.replace(store, skip_shards=("train-00099.tokens",)), seed=4)


def test_a_shard_that_is_away_for_a_moment_is_waited_for(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed(specs(at)["bytes"], tmp_path / "store")
    data = open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=16), seed=0)
    want = batch_hash(data.train.batch(0, 20))
    (tmp_path / "store" / "train-00000.tokens").rename(tmp_path / "away")
    fresh = open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=16), seed=0)
    monkeypatch.setattr(
        "portatrain.data.store.reading.time.sleep",
        lambda s: (
            (tmp_path / "away").exists() and (tmp_path / "away").rename(tmp_path / "store" / "train-00000.tokens")
        ),
    )
    assert batch_hash(fresh.train.batch(0, 20)) == want
    assert "shard train-00000.tokens cannot be read" in capsys.readouterr().err


DAMAGES = {
    "cut": (lambda text: text[:-50], "store.json"),
    "another number": (lambda text: text.replace('"vocab": 256', '"vocab": 255'), "another checksum"),
    "another version": (lambda text: text.replace("portatrain-store-1", "portatrain-store-9"), "portatrain-store-9"),
    "a list": (lambda text: "[]", "something else"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(damage: str, at: Path, tmp_path: Path) -> None:
    packed(specs(at)["bytes"], tmp_path / "store")
    change, said = DAMAGES[damage]
    path = tmp_path / "store" / "store.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=said):
        open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=16), seed=0)


def test_other_mistakes_end_in_one_paragraph(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, said in (("", "the folder or URL"), (str(tmp_path / "none"), "none there")):
        with pytest.raises(UserError, match=said):
            open_data(PackedTokens(path=path, seq_len=16), seed=0)
    packed(specs(at)["bytes"], tmp_path / "store")
    with pytest.raises(UserError, match="expected the fingerprint f00"):
        open_data(PackedTokens(path=str(tmp_path / "store"), seq_len=16, fingerprint="f00"), seed=0)
    (tmp_path / "r.py").write_text(RECIPE.format(paths=str(at / "corpus"), tokenizer=str(at / "tokenizer.json")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    recipe = str(tmp_path / "r.py")
    for args, said in (
        ([recipe, str(tmp_path / "full")], "a folder that is empty or not there"),
        ([recipe, str(tmp_path / "x"), "--workers", "0"], "--workers: expected at least 1"),
        ([recipe, str(tmp_path / "x"), "--set", "data.tokenizer=nowhere.json"], "tokenizer nowhere.json"),
        ([recipe, str(tmp_path / "x"), "--set", "data.paths=nowhere"], "TextFiles paths"),
        ([recipe, str(tmp_path / "x"), "--set", "data=Digits"], "images or arrays"),
    ):
        assert main(["data", "pack", *args]) == 2
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err
        assert not (tmp_path / "x").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_pack_show_stats_and_a_second_packer(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.py").write_text(RECIPE.format(paths=str(at / "corpus"), tokenizer=str(at / "tokenizer.json")))
    out = tmp_path / "store"
    (out / "unfinished").mkdir(parents=True)
    claim = Claim.acquire(out / "unfinished" / "claim")
    assert main(["data", "pack", str(tmp_path / "r.py"), str(out)]) == 2
    assert "a claim of process" in capsys.readouterr().err
    claim.release()
    assert main(["data", "pack", str(tmp_path / "r.py"), str(out), "--workers", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    spec = PackedTokens(**{k: v for k, v in said.items() if k != "data"})
    assert said["data"] == "PackedTokens" and spec.seq_len == 16
    assert sorted(p.name for p in out.iterdir()) == ["store.json", "train-00000.tokens", "validation-00000.tokens"]
    data = open_data(spec, seed=0)
    assert main(["data", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert spec.fingerprint in shown and f"{data.streams['train'].size:,} tokens" in shown
    assert "2 documents without content: 003.txt, 017.txt" in shown
    assert main(["data", "stats", str(tmp_path), "--json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        sizes = [len(d) for d in data.streams[row["split"]]]
        assert (row["documents"], row["longest"]) == (len(sizes), max(sizes))
        assert row["bytes_a_token"] == data.streams[row["split"]].bytes / sum(sizes)
        assert [n for *_, n in row["lengths"]] == [
            sum(low <= s <= high for s in sizes) for low, high, _ in row["lengths"]
        ] and sum(n for *_, n in row["lengths"]) == len(sizes)
    assert main(["data", "stats", str(out)]) == 0 and main(["data", "verify", str(out)]) == 0
    assert "good" in capsys.readouterr().out


def test_a_mixture_becomes_a_mixture_of_stores(
    at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, lines = specs(at)["bytes"], specs(at)["lines"]
    mixture = Mixture(sources=(text, lines), weights=(3.0, 1.0), block=8)
    (tmp_path / "m.py").write_text(
        RECIPE.format(paths=str(at / "corpus"), tokenizer=None).replace(
            "TextFiles(", f"{mixture!r} if True else TextFiles("
        )
        + "\nfrom portatrain.data import *\n"
    )
    assert main(["data", "pack", str(tmp_path / "m.py"), str(tmp_path / "stores"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stores = tuple(PackedTokens(**one) for one in said["sources"])
    assert [Path(one.path).name for one in stores] == ["source-0", "source-1"]
    got, want = open_data(dataclasses.replace(mixture, sources=stores), seed=5), open_data(mixture, seed=5)
    assert batch_hash(got.train.batch(3, 40)) == batch_hash(want.train.batch(3, 40))
    assert batch_hash(got.validation.batch(0, 20)) == batch_hash(want.validation.batch(0, 20))
    assert got.bytes_per_target == want.bytes_per_target
    assert main(["data", "verify", str(tmp_path / "stores")]) == 0
    assert capsys.readouterr().out.count("good") == 2


def many_shards(shards: int, shard_blocks: int) -> Manifest:
    facts = SplitFacts(
        tokens=shards * shard_blocks * TOKENS - 77,
        documents=10**6,
        bytes=None,
        longest=9,
        groups=2,
        lengths=(),
        sha256=tuple(f"{n:064x}" for n in range(shards)),
    )
    return Manifest(
        dtype="uint32", vocab=2**17, bos=0, shard_blocks=shard_blocks, made_from={}, splits={"train": facts}
    )


class Counting:
    """A place with shards that are made when they are read; it notes what was asked for."""

    where = "simulated"

    def __init__(self, manifest: Manifest) -> None:
        self._manifest, self.asked = manifest, set[tuple[str, int, int]]()

    def read(self, name: str, start: int, length: int) -> bytes:
        from portatrain.data.store.layout import seal

        kind = self._manifest.block()
        self.asked.add((name, start, length))
        first = int(name.split("-")[1].split(".")[0]) * self._manifest.shard_blocks + start // kind.itemsize
        ids = (np.arange(length // kind.itemsize * TOKENS) + first * TOKENS) % 100_003
        return seal(ids.astype(np.uint32), ids % 500 == 0, ids % 500 != 0, kind).tobytes()

    def get(self, name: str) -> bytes | None:
        return self._manifest.as_bytes()

    def forget(self, name: str) -> None:
        pass


def test_position_in_a_store_of_ten_thousand_shards_is_closed_form() -> None:
    made = many_shards(10_000, 15_000)  # 1.2e12 tokens
    assert parse("simulated", made.as_bytes()) == made
    place = Counting(made)
    stream = reading.PackedStream(place, made, "train", reading.Pool(4), None)  # type: ignore[arg-type]
    windows = Windows(stream, name="train", seq_len=4096, seed=1, permuted=True, order="data/train")
    batch = windows.batch(10**7 * 256, 8)
    # A host reads the blocks of its windows, and nothing else.
    assert len(place.asked) <= 16 and sum(length for *_, length in place.asked) <= 16 * 2 * made.block().itemsize
    begin = windows._order(batch["sample"]) * 4096
    assert np.array_equal(batch["tokens"], (begin[:, None] + np.arange(4096)) % 100_003)
    assert np.array_equal(batch["targets"], (begin[:, None] + np.arange(1, 4097)) % 100_003)
    for hosts in (1, 4, 8):
        parts = [windows.batch(10**7 * 256 + host * (8 // hosts), 8 // hosts) for host in range(hosts)]
        assert all(np.array_equal(np.concatenate([p[k] for p in parts]), v) for k, v in batch.items())


def test_a_process_reads_the_windows_of_its_rows_and_no_others(at: Path, tmp_path: Path) -> None:
    made = many_shards(1000, 20)
    place = Counting(made)
    stream = reading.PackedStream(place, made, "train", reading.Pool(4), None)  # type: ignore[arg-type]
    windows = Windows(stream, name="train", seq_len=512, seed=1, permuted=True, order="data/train")
    want, rows = windows.batch(40, 16), np.tile([True, True, False, False], 4)
    with prefetch(windows, 40, 16, rows=lambda count: rows) as batches:
        got = batches.get(lambda: False)
    assert got is not None and {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in want.items()
    }
    for key, value in want.items():
        assert np.array_equal(got[key][rows], value[rows])
    assert np.array_equal(got["sample"], want["sample"]) and not got["mask"][~rows].any()
    place.asked.clear()
    windows.part(40, 16, rows)
    mine = windows._order(want["sample"][rows]) * 512
    touched = {int(b) // TOKENS for one in mine for b in (one, one + 512)}
    size = made.block().itemsize
    blocks = {(name, start // size + i) for name, start, length in place.asked for i in range(length // size)}
    assert blocks == {(f"train-{b // 20:05d}.tokens", b % 20) for b in touched}
    text, lines = specs(at)["bytes"], specs(at)["lines"]
    packed(text, tmp_path / "a")
    packed(lines, tmp_path / "b")
    stores = tuple(PackedTokens(path=str(tmp_path / name), seq_len=16) for name in "ab")
    mixed = open_data(Mixture(sources=stores, weights=(1.0, 1.0)), seed=0).train
    whole, part = mixed.batch(8, 16), mixed.part(8, 16, rows)
    assert all(np.array_equal(part[key][rows], value[rows]) for key, value in whole.items())
    assert not part["mask"][~rows].any() and np.array_equal(part["source"], whole["source"])


def test_every_window_of_an_epoch_comes_once() -> None:
    made = many_shards(3, 2)
    stream = reading.PackedStream(Counting(made), made, "train", reading.Pool(2), None)  # type: ignore[arg-type]
    windows = Windows(stream, name="train", seq_len=100, seed=1, permuted=True, order="data/train")
    for epoch in (0, 1):
        seen = windows._order(np.arange(windows.windows) + epoch * windows.windows)
        assert np.array_equal(np.sort(seen), np.arange(windows.windows))
    got = np.concatenate([b["targets"][b["mask"] > 0] for b in windows.once(64)])
    whole = np.arange(made.splits["train"].tokens)[1:]
    assert np.array_equal(np.sort(got), np.sort(whole[whole % 500 != 0]))


def test_a_process_that_tokenises_and_dies_is_started_again(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_path = str(at / "tokenizer.json")
    documents = [(b"w5 w6", "a"), (b"", "b"), ("w7é".encode(), "c")]
    want = [Tokenized(tokenizer_path, None)(*one).tolist() for one in documents]
    made = encoders.Processes(tokenizer_path, None, 1)
    try:
        assert [one.tolist() for one in made.encode(documents).result()] == want
        made._all[0]._child.kill()
        assert [one.tolist() for one in made.encode(documents).result()] == want
        with pytest.raises(UserError, match=r"^d: expected UTF-8"):
            made.encode([(b"\xff", "d")]).result()
        monkeypatch.setattr("sys.executable", "/bin/false")
        made._all[0]._child.kill()
        with pytest.raises(StorageError, match=r"one that ended twice \(exit code 1\) on 3 documents.*fewer --workers"):
            made.encode(documents).result()
    finally:
        made.close()
