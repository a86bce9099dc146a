"""Every source of files, with every kind of thing that is no data of its kind: refused with its name, or passed over,
counted and named; never a part of the corpus."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.data import Jsonl, Mixture, TextFiles, TokenMemmap, open_data
from portatrain.data.contents import check_ids, is_text, recognised
from portatrain.errors import UserError

WORDS = "".join(f"a text of {n} words, {{}}\n" for n in range(40)).encode()
IDS = np.arange(600, dtype="<u2") % 300


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


def tarred(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def llm_c(magic: int, ids: np.ndarray) -> bytes:
    return np.array([magic, 1, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes()


# What must be recognised in a file of text and in one of ids alike, whatever its name.
FOREIGN = {
    "npy of int32": saved(IDS.astype("<i4")),
    "npy of floats": saved(np.linspace(0, 1, 64)),
    "npy in 2D": saved(IDS.reshape(2, -1)),
    "gzip": gzip.compress(WORDS),
    "gzip of ids": gzip.compress(IDS.tobytes()),
    "zstd": b"\x28\xb5\x2f\xfd\x04\x58\x41\x00\x00" + bytes(range(60)),
    "bzip2": bz2.compress(WORDS),
    "xz": lzma.compress(WORDS),
    "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(range(61)),
    "zip": zipped(WORDS),
    "tar": tarred(WORDS),
    "parquet": b"PAR1\x15\x04\x15\x10" + bytes(range(100)) + b"PAR1",
    "arrow": b"ARROW1\0\0" + bytes(range(100)),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(range(100)),
    "safetensors": struct.pack("<Q", 2) + b"{}" + bytes(64),
    **{
        f"pickle {p} of {type(v).__name__}": pickle.dumps(v, p) for p in (2, 3, 4, 5) for v in ([1, "a"], {"a": 1}, IDS)
    },
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(84)),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(83)),
    "elf": b"\x7fELF\x02\x01\x01\0" + bytes(range(100)),
    "megatron index": b"MMIDIDX\0\0" + bytes(range(65)),
}
TEXTS_ONLY = {  # what is no text, but could be ids
    "utf-16": WORDS.decode().encode("utf-16"),
    "utf-16-be with a mark": b"\xfe\xff" + WORDS.decode().encode("utf-16-be"),
    "utf-32": WORDS.decode().encode("utf-32"),
    "ids": IDS.tobytes(),
    "ids saved": saved(IDS),
    **{f"llm.c {magic}": llm_c(magic, IDS) for magic in (20240520, 20240801)},
    "a byte 0": WORDS + b"\0",
}
IDS_ONLY = {"text": WORDS, "json": json.dumps({"tokens": list(range(50))}).encode()}

SOURCES: dict[str, tuple[Callable[[str], Any], str, bytes, dict[str, bytes]]] = {
    "TextFiles": (lambda paths: TextFiles(paths=paths, seq_len=8, validation=0), ".txt", WORDS, FOREIGN | TEXTS_ONLY),
    "Jsonl": (
        lambda paths: Jsonl(paths=paths, seq_len=8, validation=0),
        ".jsonl",
        json.dumps({"text": WORDS.decode()}).encode() + b"\n",
        FOREIGN | TEXTS_ONLY | {"invalid utf-8": b'{"text": "\xe9"}\n'},
    ),
    "TokenMemmap": (
        lambda paths: TokenMemmap(paths=paths, seq_len=8, vocab=65_536, validation=0),
        ".bin",
        IDS.tobytes(),
        FOREIGN | IDS_ONLY,
    ),
    "TokenMemmap of uint32": (
        lambda paths: TokenMemmap(paths=paths, seq_len=8, vocab=2**31, dtype="uint32", validation=0),
        ".bin",
        IDS.astype("<u4").tobytes(),
        {k: v for k, v in FOREIGN.items() if "npy" not in k} | IDS_ONLY | {"npy of uint16": saved(IDS)},
    ),
}
CASES = [(source, wrong) for source, (*_, wrongs) in SOURCES.items() for wrong in wrongs]


def test_the_family_is_large() -> None:
    assert len(CASES) > 120


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_no_data_of_its_kind_is_refused_with_its_name(tmp_path: Path, source: str) -> None:
    make, suffix, good, wrongs = SOURCES[source]
    for i, (wrong, content) in enumerate(wrongs.items()):
        for ways in ("name", "folder", "glob"):
            folder = tmp_path / f"{i}-{ways}"
            folder.mkdir()
            bad = folder / f"bad{suffix}"
            bad.write_bytes(content)
            if ways != "name":
                (folder / f"good{suffix}").write_bytes(good)
            paths = {"name": bad, "folder": folder, "glob": folder / "**" / "*"}[ways]
            spec = make(str(paths))
            for given in (spec, Mixture(sources=(spec, spec), weights=(1.0, 1.0))):
                with pytest.raises(UserError) as caught:
                    open_data(given, seed=0, pack_dir=tmp_path / "pack")
                    pytest.fail(f"{wrong} was taken as data")
                assert str(bad) in str(caught.value) and "\n" not in str(caught.value), wrong
                assert not (tmp_path / "pack").exists()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    held = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    held.bind(path.name)
    os.chdir(here)
    held.close()


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.md").write_bytes(b"not asked for")


PASSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a broken link": (lambda path: path.symlink_to("nowhere"), "1 broken link: "),
    "a link to itself": (lambda path: path.symlink_to(path.name), "1 broken link: "),
    "a pipe": (_pipe, "1 special file (pipes, sockets or devices): "),
    "a socket": (_socket, "1 special file (pipes, sockets or devices): "),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "1 special file (pipes, sockets or devices): "),
    "an empty file": (lambda path: path.touch(), "1 empty file: |1 document without content: "),
    "a loop": (lambda path: path.symlink_to(path.parent), "1 link to a folder that contains it"),
    "a link out": (lambda path: path.symlink_to(path.parent.parent), "1 link to a folder that contains it"),
}


@pytest.mark.parametrize("ways", ["folder", "glob", "deep"])
@pytest.mark.parametrize("what", PASSED)
def test_what_is_passed_over_is_counted_and_named(tmp_path: Path, what: str, ways: str) -> None:
    place, reason = PASSED[what]
    for source, (make, suffix, good, _) in SOURCES.items():
        top = tmp_path / source
        corpus = top / "corpus"
        corpus.mkdir(parents=True)
        (top / f"outside{suffix}").write_bytes(good)
        (corpus / f"good{suffix}").write_bytes(good)
        paths = str({"folder": corpus, "glob": corpus / f"*{suffix}", "deep": corpus / "**" / f"*{suffix}"}[ways])
        alone = open_data(make(paths), seed=0)
        assert alone.passed_over == ()
        place(corpus / f"bad{suffix}")
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.append(open_data(make(paths), seed=0)), daemon=True)  # noqa: B023
        reader.start()
        reader.join(20)
        assert found, f"{source} waits for {what}"
        assert found[0].fingerprint == alone.fingerprint
        if ways == "glob" and what in ("a loop", "a link out"):
            reason = "1 folder that a pattern matches|1 link to a folder"
        (said,) = found[0].passed_over
        assert any(r in said for r in reason.split("|")) and ": 1 " in said and f"bad{suffix}" in said, said


def test_given_by_name_they_are_refused(tmp_path: Path) -> None:
    for what in ("a broken link", "a pipe", "a socket", "a device"):
        path = tmp_path / what
        PASSED[what][0](path)
        for make, *_ in SOURCES.values():
            with pytest.raises(UserError, match=f"got .*{what}"):
                open_data(make(str(path)), seed=0)


def test_a_folder_with_the_name_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS)
    _folder(tmp_path / "b.txt")
    (said,) = open_data(SOURCES["TextFiles"][0](str(tmp_path / "*.txt")), seed=0).passed_over
    assert "1 folder that a pattern matches" in said and "b.txt" in said
    whole = open_data(SOURCES["TextFiles"][0](str(tmp_path / "**" / "*")), seed=0)
    assert len(whole.streams["train"].starts) == 2 and whole.passed_over == ()


def test_linked_folders_are_read_and_each_file_once(tmp_path: Path) -> None:
    corpus, shelf = tmp_path / "corpus", tmp_path / "shelf"
    for folder in (corpus / "real", shelf):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_bytes(WORDS + str(folder).encode())
    (corpus / "a_link").symlink_to(corpus / "real")  # comes before the folder, in order
    (corpus / "shelf").symlink_to(shelf)
    (corpus / "again").symlink_to(shelf)
    (shelf / "back").symlink_to(corpus)
    from portatrain.data.finding import PassedOver, find

    for paths in (str(corpus), str(corpus / "**" / "*.txt")):
        passed = PassedOver()
        assert [n for n, _ in find(paths, "x", passed)] == ["again/a.txt", "real/a.txt"]
        (said,) = passed.sentences("x")
        assert "back" in said


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_bytes(WORDS)
    real = os.listdir

    def listdir(path: Any) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    for paths in (str(tmp_path), str(tmp_path / "**" / "*.txt")):
        with pytest.raises(UserError, match=r"data folder .*closed.*Permission denied"):
            open_data(SOURCES["TextFiles"][0](paths), seed=0)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.txt", b"a\nb.txt", b"\x1b[31m.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(WORDS)
    spec = dataclasses.replace(SOURCES["TextFiles"][0](str(tmp_path)), validation=0.4)
    assert sum(len(s.starts) for s in open_data(spec, seed=0).streams.values()) == 3


def test_bytes_that_are_not_utf_8_are_tokens_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " * 9)
    data = open_data(SOURCES["TextFiles"][0](str(tmp_path)), seed=0, pack_dir=tmp_path / "pack")
    (said,) = data.passed_over
    assert "1 file that is not UTF-8" in said and "b.txt" in said
    assert open_data(SOURCES["TextFiles"][0](str(tmp_path)), seed=0, pack_dir=tmp_path / "pack").passed_over == (said,)


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_shards_of_llm_c_are_read_without_their_header(tmp_path: Path, magic: int) -> None:
    dtype = {20240520: "uint16", 20240801: "uint32"}[magic]
    ids = IDS.astype(f"<{'u2' if dtype == 'uint16' else 'u4'}")
    (tmp_path / "a.bin").write_bytes(llm_c(magic, ids))
    spec = TokenMemmap(paths=str(tmp_path / "a.bin"), seq_len=8, vocab=300, dtype=dtype, validation=0)
    assert open_data(spec, seed=0).streams["train"].document(0).tolist() == ids.tolist()
    other = "uint32" if dtype == "uint16" else "uint16"
    with pytest.raises(UserError, match=f"Set dtype to '{dtype}'"):
        open_data(dataclasses.replace(spec, dtype=other), seed=0)
    (tmp_path / "a.bin").write_bytes(llm_c(magic, ids)[:-8])
    with pytest.raises(UserError, match="cut or changed"):
        open_data(spec, seed=0)


def test_an_array_of_numpy_is_read_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(saved(IDS))
    spec = TokenMemmap(paths=str(tmp_path / "a.bin"), seq_len=8, vocab=300, validation=0)
    assert open_data(spec, seed=0).streams["train"].document(0).tolist() == IDS.tolist()
    (tmp_path / "b.npy").write_bytes(IDS.tobytes())
    with pytest.raises(UserError, match="without the mark"):
        open_data(dataclasses.replace(spec, paths=str(tmp_path / "b.npy")), seed=0)


def test_a_text_about_formats_is_text(tmp_path: Path) -> None:
    for mark in ("GIF89a", "%PDF-1.7", "RIFF", "PAR1", "BZh", "ID3", "PK"):
        (tmp_path / "a.txt").write_text(f"{mark} is the mark of a format.\n" * 9)
        open_data(SOURCES["TextFiles"][0](str(tmp_path / "a.txt")), seed=0)


@pytest.mark.parametrize("vocab", [256, 50_257, 65_536, 128_256])
def test_raw_ids_are_not_mistaken_for_a_format(vocab: int) -> None:
    rng = np.random.default_rng(0)
    dtype = "<u2" if vocab <= 65_536 else "<u4"
    for _ in range(300):
        head = rng.integers(0, vocab, 2048).astype(dtype).tobytes()[:4096]
        check_ids(Path("x"), head, len(head), np.dtype(dtype).itemsize)
        for mark in (b"\x1f\x8b\x08", b"BZh9", b"\xff\xd8\xff", b"\x80\x04\x95", b"\x80\x02"):
            assert recognised(mark + head, len(head)) is None


def test_a_character_that_is_cut_is_text() -> None:
    assert is_text("é".encode()[:1]) and not is_text(b"\xe9a")


@pytest.mark.parametrize("name", ["UTF-16", "UTF-32"])
def test_the_command_that_converts_text_names_its_encoding(tmp_path: Path, name: str) -> None:
    (tmp_path / "one.txt").write_bytes(WORDS.decode().encode(name))
    with pytest.raises(UserError, match=f"iconv -f {name} -t UTF-8"):
        open_data(TextFiles(paths=str(tmp_path), seq_len=4), seed=0)
