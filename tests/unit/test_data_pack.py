"""Packs in a folder: the same data without the source, whole or not at all, and refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from portatrain.data import Digits, Jsonl, Mixture, OpenData, TextFiles, TokenMemmap, batch_hash, open_data
from portatrain.data import pack as packs
from portatrain.errors import UserError
from tests.support.folders import listing


def corpus(root: Path) -> Path:
    root.mkdir(parents=True)
    for i in range(20):
        (root / f"{i}.txt").write_bytes(b"text number %d. " % i * (i + 1))
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 5}) + "\n" for i in range(40)))
    (np.arange(900) % 50).astype(np.uint16).tofile(root / "ids.bin")
    return root


def specs(root: Path) -> dict[str, object]:
    text = TextFiles(paths=str(root / "*.txt"), seq_len=16, validation=0.3)
    lines = Jsonl(paths=str(root / "lines.jsonl"), seq_len=16, validation=0.3)
    return {
        "text": text,
        "jsonl": lines,
        "tokens": TokenMemmap(paths=str(root / "ids.bin"), seq_len=16, vocab=50, separator=0, validation=0.3),
        "digits": Digits(),
        "mixture": Mixture(sources=(text, lines), weights=(3.0, 1.0), block=8),
    }


KINDS = ("text", "jsonl", "tokens", "digits", "mixture")


def summary(data: OpenData) -> tuple:
    held = data.validation.batch(0, data.validation.windows)
    return (data.fingerprint, data.vocab, data.bytes_per_target, batch_hash(data.train.batch(5, 30)), batch_hash(held))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_outlives_its_source(tmp_path, kind):
    root = corpus(tmp_path / "source")
    spec = specs(root)[kind]
    want = summary(open_data(spec, seed=3))
    pack_dir = tmp_path / "run" / "pack"
    assert summary(open_data(spec, seed=3, pack_dir=pack_dir)) == want
    shutil.rmtree(root)
    before = listing(tmp_path)
    assert summary(open_data(spec, seed=3, pack_dir=pack_dir)) == want
    moved = shutil.copytree(pack_dir, tmp_path / "elsewhere")
    assert summary(open_data(spec, seed=3, pack_dir=str(moved))) == want
    shutil.rmtree(moved)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path, kind):
    a, b = (specs(corpus(tmp_path / p / "source"))[kind] for p in ("a", "b/c"))
    first = open_data(a, seed=0, pack_dir=tmp_path / "pack")
    assert summary(first) == summary(open_data(b, seed=0))
    assert first.fingerprint == open_data(a, seed=1).fingerprint
    if kind == "digits":
        return
    for name in ("3.txt", "lines.jsonl", "ids.bin"):
        path = tmp_path / "b/c/source" / name
        data = bytearray(path.read_bytes())
        data[14] ^= 1  # stays inside the string of the json line and below the vocabulary
        path.write_bytes(data)
    assert open_data(b, seed=0).fingerprint != first.fingerprint


@pytest.mark.parametrize("limit", [packs.VERIFY_BYTES, 0], ids=["verified whole", "verified cheaply"])
def test_windows_of_another_length_from_one_pack(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(packs, "VERIFY_BYTES", limit)
    spec = specs(corpus(tmp_path / "source"))["text"]
    open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    longer = dataclasses.replace(spec, seq_len=64)
    got = open_data(longer, seed=0, pack_dir=tmp_path / "pack")
    assert summary(got) == summary(open_data(longer, seed=0))
    with pytest.raises(UserError, match="at least 100,001 tokens"):
        open_data(dataclasses.replace(spec, seq_len=100_000), seed=0, pack_dir=tmp_path / "pack")


def test_a_pack_of_other_data_is_refused(tmp_path):
    spec = specs(corpus(tmp_path / "source"))["text"]
    open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"expected validation=0.4, got one made with validation=0.3"):
        open_data(dataclasses.replace(spec, validation=0.4), seed=0, pack_dir=tmp_path / "pack")
    with pytest.raises(UserError, match="expected source='Digits'"):
        open_data(Digits(validation=0.3), seed=0, pack_dir=tmp_path / "pack")
    assert listing(tmp_path) == before


def edit(pack: Path, change) -> None:
    meta = json.loads((pack / "pack.json").read_text())
    change(meta)
    (pack / "pack.json").write_text(json.dumps(meta))


DAMAGE = {
    "no pack.json": lambda p: (p / "pack.json").unlink(),
    "pack.json cut": lambda p: os.truncate(p / "pack.json", 100),
    "pack.json is text": lambda p: (p / "pack.json").write_text("hello"),
    "pack.json is a list": lambda p: (p / "pack.json").write_text("[]"),
    "pack.json without arrays": lambda p: edit(p, lambda m: m.pop("arrays")),
    "another format": lambda p: edit(p, lambda m: m.update(format="portatrain-pack-9")),
    "another vocabulary": lambda p: edit(p, lambda m: m["facts"]["meaning"].update(vocab=9)),
    "another byte count": lambda p: edit(p, lambda m: m["facts"].update(train_bytes=9)),
    "another fingerprint": lambda p: edit(p, lambda m: m["fingerprints"].update(train="0" * 64)),
    "a path that climbs": lambda p: edit(p, lambda m: m["arrays"].update({"../x": m["arrays"]["train-tokens"]})),
    "an object type": lambda p: edit(p, lambda m: m["arrays"]["train-tokens"].update(dtype="object")),
    "a negative size": lambda p: edit(p, lambda m: m["arrays"]["train-tokens"].update(size=-1)),
    "no tokens": lambda p: (p / "train-tokens.bin").unlink(),
    "tokens cut": lambda p: os.truncate(p / "train-tokens.bin", 100),
    "tokens longer": lambda p: os.truncate(p / "train-tokens.bin", 10**6),
    "starts cut": lambda p: os.truncate(p / "validation-starts.bin", 8),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "a bit flipped", "a file", "somebody's folder"])
def test_damage_is_refused_and_nothing_changed(tmp_path, damage):
    spec, pack = specs(corpus(tmp_path / "source"))["text"], tmp_path / "pack"
    open_data(spec, seed=0, pack_dir=pack)
    if damage == "a bit flipped":
        data = bytearray((pack / "train-tokens.bin").read_bytes())
        data[77] ^= 4
        (pack / "train-tokens.bin").write_bytes(data)
    elif damage in ("a file", "somebody's folder"):
        shutil.rmtree(pack)
        target = pack if damage == "a file" else pack / "thesis.tex"
        target.parent.mkdir(exist_ok=True)
        target.write_text("precious")
    else:
        DAMAGE[damage](pack)
    before = listing(tmp_path)
    with pytest.raises(UserError, match="pack"):
        open_data(spec, seed=0, pack_dir=pack)
    assert listing(tmp_path) == before


def flipped(path: Path, at: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A pack that counts as too large to be verified when it is opened, of several blocks."""
    monkeypatch.setattr(packs, "VERIFY_BYTES", 0)
    monkeypatch.setattr(packs, "BLOCK_BYTES", 64)
    spec = specs(corpus(tmp_path / "source"))["text"]
    open_data(spec, seed=0, pack_dir=tmp_path / "pack")
    return spec, tmp_path / "pack"


def read_all(spec, pack: Path) -> None:
    data = open_data(spec, seed=0, pack_dir=pack)
    for split in (data.train, data.validation):
        for _ in split.once(4):
            pass


def test_every_damaged_token_of_a_large_pack_is_seen_when_it_is_read(large):
    spec, pack = large
    read_all(spec, pack)
    for name in ("train-tokens.bin", "validation-tokens.bin"):
        for at in range(0, (pack / name).stat().st_size, 37):
            flipped(pack / name, at)
            with pytest.raises(UserError, match=f"{name}.*CRC-32"):
                read_all(spec, pack)
            flipped(pack / name, at)
    read_all(spec, pack)


def test_a_window_of_a_large_pack_is_held_to_its_own_blocks_alone(large):
    spec, pack = large
    data = open_data(spec, seed=0, pack_dir=pack)
    flipped(pack / "train-tokens.bin", 3 * 64)
    for window in range(data.train.windows):
        begin = window * spec.seq_len
        if begin // 64 <= 3 <= (begin + spec.seq_len) // 64:
            with pytest.raises(UserError, match="CRC-32"):
                data.streams["train"].read(begin, begin + spec.seq_len + 1)
        else:
            data.streams["train"].read(begin, begin + spec.seq_len + 1)


@pytest.mark.parametrize("name", ["train-starts.bin", "validation-starts.bin", "train-tokens.sums"])
def test_what_reads_of_a_large_pack_rest_on_is_verified_at_once(large, name):
    spec, pack = large
    flipped(pack / name, 0)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_data(spec, seed=0, pack_dir=pack)


@pytest.mark.parametrize("earlier_release", [False, True])
def test_a_large_pack_is_verified_in_the_background(large, earlier_release):
    spec, pack = large
    if earlier_release:  # one without sums of blocks
        edit(pack, lambda m: m.pop("sums"))
        edit(pack, lambda m: m.update(check=packs._check(m)))
        for path in pack.glob("*.sums"):
            path.unlink()
    (good,) = open_data(spec, seed=0, pack_dir=pack).verifications
    good.start()
    good.wait()
    flipped(pack / "validation-tokens.bin", 5)
    (bad,) = open_data(spec, seed=0, pack_dir=pack).verifications
    bad.start()
    with pytest.raises(UserError, match="SHA-256"):
        bad.wait()
    with pytest.raises(UserError, match="SHA-256"):
        bad.check()


def test_sums_change_no_fingerprint(tmp_path, monkeypatch):
    spec = specs(corpus(tmp_path / "source"))["text"]
    assert open_data(spec, seed=0).fingerprint == open_data(spec, seed=0, pack_dir=tmp_path / "pack").fingerprint


def test_data_verify(large, capsys):
    from portatrain.cli import main

    _, pack = large
    assert main(["data", "verify", str(pack.parent)]) == 0
    assert f"{pack}: good" in capsys.readouterr().out
    flipped(pack / "train-tokens.bin", 9)
    assert main(["data", "verify", str(pack)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert main(["data", "verify", str(pack), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert "SHA-256" in row["problem"]
    assert main(["data", "verify", str(pack.parent / "source")]) == 2
    assert main(["data", "verify", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_empty_folder_is_filled(tmp_path):
    spec, pack = specs(corpus(tmp_path / "source"))["text"], tmp_path / "pack"
    pack.mkdir()
    open_data(spec, seed=0, pack_dir=pack)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pack", "source"]


def test_many_pack_at_once(tmp_path):
    spec = specs(corpus(tmp_path / "source"))["text"]
    want = summary(open_data(spec, seed=0))
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(open_data, spec, seed=0, pack_dir=tmp_path / "run" / "pack") for _ in range(12)]
        assert {summary(job.result()) for job in jobs} == {want}
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["pack"]


def test_a_failure_at_any_write_leaves_nothing(tmp_path, monkeypatch):
    spec = specs(corpus(tmp_path / "source"))["text"]
    before, real, fails_at, calls = listing(tmp_path), os.fsync, 0, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for n in range(1, 7):  # four arrays, pack.json, and the folder before it gets its name
        fails_at, calls = n, 0
        with pytest.raises(UserError, match=r"pack .*No space left on device.*Free some space"):
            open_data(spec, seed=0, pack_dir=tmp_path / "run" / "a" / "pack")
        assert listing(tmp_path) == before
    fails_at = 0
    open_data(spec, seed=0, pack_dir=tmp_path / "run" / "a" / "pack")


def test_a_pack_is_small_enough_to_keep(tmp_path):
    spec, pack = specs(corpus(tmp_path / "source"))["text"], tmp_path / "pack"
    data = open_data(spec, seed=0, pack_dir=pack)
    files = {p.name: p.stat().st_size for p in pack.iterdir()}
    for split, stream in data.streams.items():
        assert files[f"{split}-tokens.bin"] == stream.bytes + len(stream.starts)
        assert not stream.tokens.flags.writeable
