"""The cache of packed corpora: runs of one corpus pack it once, and nothing that is wrong with it ends a run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from portatrain.data import DataSpec, Jsonl, Mixture, TextFiles, TokenMemmap, batch_hash, corpus, open_data, pack_cache
from portatrain.errors import UserError
from tests.support.packed import tokenizer

Made = list[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTATRAIN_PACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The class of each source that was packed, in order."""
    found, produce = [], corpus._produce

    def counted(spec: DataSpec, writer: Any) -> Any:
        found.append(type(spec).__name__)
        return produce(spec, writer)

    monkeypatch.setattr(corpus, "_produce", counted)
    return found


def texts(at: Path) -> TextFiles:
    at.mkdir(exist_ok=True)
    for n in range(12):
        (at / f"{n}.txt").write_text(f"document {n} " * (n + 9))
    return TextFiles(paths=str(at), seq_len=16, validation=0.2, tokenizer=str(tokenizer(at.parent / "tokenizer.json")))


def entries(cache: Path) -> list[str]:
    return sorted(os.listdir(cache))


def seen(spec: DataSpec, pack_dir: Path) -> tuple[str, ...]:
    data = open_data(spec, seed=3, pack_dir=pack_dir)
    assert data.validation is not None
    return data.fingerprint, batch_hash(data.train.batch(5, 8)), batch_hash(data.validation.batch(0, 2))


def test_three_runs_pack_once(cache: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = texts(tmp_path / "texts")
    found = [seen(spec, tmp_path / f"run-{n}" / "data") for n in range(3)]
    assert made == ["TextFiles"] and len(entries(cache)) == 1
    # What is cut in another way is cut from the same pack.
    seen(replace(spec, seq_len=8), tmp_path / "run-3" / "data")
    assert made == ["TextFiles"]
    monkeypatch.setenv("PORTATRAIN_PACK_CACHE", "off")
    assert {*found, seen(spec, tmp_path / "alone" / "data")} == {found[0]} and len(made) == 2
    for n in range(3):  # the pack of a run is its own, and travels with it
        there, alone = tmp_path / f"run-{n}" / "data", tmp_path / "alone" / "data"
        assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}
        assert all(p.stat().st_nlink == 1 for p in there.iterdir())


def other_text(spec: TextFiles, at: Path) -> TextFiles:
    """The same size and the same time: only the content tells."""
    path = at / "texts" / "3.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("document", "documenT"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return spec


def other_name(spec: TextFiles, at: Path) -> TextFiles:
    (at / "texts" / "3.txt").rename(at / "texts" / "33.txt")
    return spec


def other_tokenizer(spec: TextFiles, at: Path) -> TextFiles:
    path = at / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    return spec


def held_out(spec: TextFiles, at: Path) -> TextFiles:
    return replace(spec, validation=0.5)


def other_code(spec: TextFiles, at: Path) -> TextFiles:
    return spec


@pytest.mark.parametrize("change", [other_text, other_name, other_tokenizer, held_out, other_code])
def test_whatever_decides_the_pack_is_in_the_name(
    change: Callable[[TextFiles, Path], TextFiles],
    cache: Path,
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = texts(tmp_path / "texts")
    seen(spec, tmp_path / "a" / "data")
    if change is other_code:
        monkeypatch.setattr(pack_cache, "_code", lambda: "another release")
    after = change(spec, tmp_path)
    found = seen(after, tmp_path / "b" / "data")
    assert len(made) == 2 and len(entries(cache)) == 2
    monkeypatch.setenv("PORTATRAIN_PACK_CACHE", "off")
    assert found == seen(after, tmp_path / "c" / "data")


def test_records_and_mixtures(cache: Path, made: Made, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"text": "line {n} of some lines"}}\n' for n in range(40)))
    one = texts(tmp_path / "texts")
    spec = Mixture(sources=(Jsonl(paths=str(lines), seq_len=16, tokenizer=one.tokenizer), one), weights=(0.5, 0.5))
    for n in range(2):
        open_data(spec, seed=0, pack_dir=tmp_path / str(n))
    assert sorted(made) == ["Jsonl", "TextFiles"] and len(entries(cache)) == 2


@pytest.mark.parametrize("name", ["pack.json", "train-tokens.bin", "train-starts.bin", "train-tokens.sums"])
@pytest.mark.parametrize("how", ["bit", "short", "gone"])
def test_a_damaged_entry_is_packed_anew(name: str, how: str, cache: Path, made: Made, tmp_path: Path) -> None:
    spec = texts(tmp_path / "texts")
    want = seen(spec, tmp_path / "a" / "data")
    (entry,) = cache.iterdir()
    data = bytearray((entry / name).read_bytes())
    data[len(data) // 2] ^= 4
    (entry / name).unlink() if how == "gone" else (entry / name).write_bytes(data[: -1 if how == "short" else None])
    assert seen(spec, tmp_path / "b" / "data") == want and len(made) == 2
    assert seen(spec, tmp_path / "c" / "data") == want and len(made) == 2  # it is whole again
    assert len(entries(cache)) == 1


def test_a_cache_that_cannot_be_written_is_told(cache: Path, made: Made, tmp_path: Path) -> None:
    cache.write_text("a file")
    spec = texts(tmp_path / "texts")
    data = open_data(spec, seed=0, pack_dir=tmp_path / "a" / "data")
    assert [s for s in data.passed_over if f"the cache of packed corpora in {cache} cannot be used" in s]
    assert made == ["TextFiles"]
    assert not open_data(spec, seed=0, pack_dir=tmp_path / "a" / "data").passed_over  # the run has its pack


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_somebody_else(cache: Path, made: Made, tmp_path: Path) -> None:
    cache.mkdir()
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert open_data(texts(tmp_path / "texts"), seed=0, pack_dir=tmp_path / "a" / "data").passed_over


def test_a_full_disk_is_told(cache: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(there: Any, here: Any, size: int) -> None:
        raise OSError(28, "No space left on device")

    spec = texts(tmp_path / "texts")
    seen(spec, tmp_path / "a" / "data")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    data = open_data(spec, seed=0, pack_dir=tmp_path / "b" / "data")
    assert "No space left" in data.passed_over[-1] and len(made) == 2
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["data"]


def test_what_is_wrong_with_a_source_is_said_as_without_a_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x")
    made = str(tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="one window of seq_len=16"):
        short = TextFiles(paths=str(tmp_path / "short.txt"), seq_len=16, tokenizer=made)
        open_data(short, seed=0, pack_dir=tmp_path / "a" / "data")
    assert entries(cache) == [] and not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="a file, a folder with files"):
        none = TextFiles(paths=str(tmp_path / "none"), seq_len=16, tokenizer=made)
        open_data(none, seed=0, pack_dir=tmp_path / "a" / "data")
    # A pack that was made for shorter windows is refused, too.
    spec = texts(tmp_path / "texts")
    open_data(spec, seed=0, pack_dir=tmp_path / "b")
    with pytest.raises(UserError, match="one window of seq_len=9999"):
        open_data(replace(spec, seq_len=9999), seed=0, pack_dir=tmp_path / "c")


def test_other_sources_are_packed_by_the_run(
    cache: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.bin").write_bytes(bytes(200))
    ids = TokenMemmap(paths=str(tmp_path / "ids.bin"), seq_len=8, vocab=256, dtype="uint16", validation=0)
    open_data(ids, seed=0, pack_dir=tmp_path / "a")
    monkeypatch.setattr(pack_cache, "LARGEST_BYTES", 100)
    open_data(texts(tmp_path / "texts"), seed=0, pack_dir=tmp_path / "b")
    open_data(replace(texts(tmp_path / "bytes"), tokenizer=None), seed=0, pack_dir=tmp_path / "c")
    assert made == ["TokenMemmap", "TextFiles", "TextFiles"] and not cache.exists()


def test_it_keeps_within_its_budget(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = texts(tmp_path / "texts")
    names = []
    for n, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        seen(replace(spec, validation=share), tmp_path / str(n) / "data")
        (name,) = {*entries(cache)} - {*names}
        names.append(name)
        os.utime(cache / name, (1000 + n, 1000 + n))
    one = sum(p.stat().st_size for p in (cache / names[0]).iterdir())
    monkeypatch.setattr(pack_cache, "BUDGET_BYTES", int(2.5 * one))
    seen(replace(spec, validation=0.1), tmp_path / "again" / "data")  # the oldest is used again
    assert entries(cache) == sorted([names[0], names[3]])


def test_a_source_that_changes_while_it_is_packed_makes_no_entry(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or every later run of the former files would read the new ones."""
    spec, produce = texts(tmp_path / "texts"), corpus._produce
    former = seen(spec, tmp_path / "former" / "data")
    (entry,) = entries(cache)
    pack_cache._remove(cache / entry)
    file = tmp_path / "texts" / "3.txt"
    text = file.read_text()

    def changing(spec: DataSpec, writer: Any) -> Any:
        file.write_text("another document")
        return produce(spec, writer)

    monkeypatch.setattr(corpus, "_produce", changing)
    data = open_data(spec, seed=3, pack_dir=tmp_path / "meanwhile" / "data")
    assert any("has changed while it was packed" in said for said in data.passed_over)
    assert data.fingerprint != former[0] and entries(cache) == []
    monkeypatch.setattr(corpus, "_produce", produce)
    file.write_text(text)
    assert seen(spec, tmp_path / "again" / "data") == former


def test_an_entry_is_copied_whole_or_not_at_all(
    cache: Path, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run removes it for room, whatever the moment; a copy of a part would be a damaged pack."""
    spec = texts(tmp_path / "texts")
    former = seen(spec, tmp_path / "former" / "data")
    (name,) = entries(cache)
    iterdir = Path.iterdir

    def removed_first(path: Path) -> Any:
        if path == cache / name:
            pack_cache._remove(path)
        return iterdir(path)

    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(path))  # it takes its time
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", removed_first)
        pack_dir = tmp_path / "again" / "data"
        pack_dir.parent.mkdir()
        with pytest.raises(pack_cache._Unusable):
            pack_cache._take(cache / name, pack_dir)
    assert removed and not pack_dir.exists()
    assert seen(spec, pack_dir) == former


def _pack(spec: DataSpec, pack_dir: Path, start: Any, results: Any) -> None:
    start.wait()
    results.put(seen(spec, pack_dir))


def test_two_processes_pack_at_one_time(cache: Path, tmp_path: Path) -> None:
    spec, context = texts(tmp_path / "texts"), multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    jobs = [context.Process(target=_pack, args=(spec, tmp_path / str(n) / "data", start, results)) for n in range(3)]
    for job in jobs:
        job.start()
    found = {results.get(timeout=120) for _ in jobs}
    for job in jobs:
        job.join()
    assert len(found) == 1 and len(entries(cache)) == 1
