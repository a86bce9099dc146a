"""Paths, file names and JSON as users have them: each is read, or refused in one paragraph."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portatrain.checkpoint.interop import hub_config, trees
from portatrain.cli import launch_main, main
from portatrain.data.open import open_data
from portatrain.data.spec import Jsonl, TextFiles
from portatrain.errors import UserError
from portatrain.plan.clusters.clusters_toml import read
from portatrain.plan.cost import efficiency
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files, watchdog
from portatrain.system.paths import expand, place

LATIN1 = os.fsdecode(b"caf\xe9.txt")
DEEP = "[" * 100_000


@pytest.mark.parametrize("home", [True, False])
def test_a_home_directory(home: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (monkeypatch.setenv("HOME", "/homes/me") if home else monkeypatch.delenv("HOME", raising=False))
    of_the_system = "/homes/me" if home else pwd.getpwuid(os.getuid()).pw_dir
    assert expand("~/x") == Path(of_the_system, "x") and place("~") == of_the_system
    assert (place("a/~b"), place("s3://b/~/x")) == ("a/~b", "s3://b/~/x")


def unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user id is in no table, and which sets no HOME."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])


COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "train": (main, ["train", "tiny-lm", "--run-dir", "PATH"]),
    "data": (main, ["train", "tiny-lm", "--run-dir", "x", "--set", "data=TextFiles", "--set", "data.paths=PATH"]),
    "report": (main, ["report", "PATH"]),
    "verify": (main, ["ckpt", "verify", "PATH"]),
    "submit": (launch_main, ["--cluster", "local", "tiny-lm", "--runs", "PATH"]),
    "list": (launch_main, ["list", "--runs", "PATH"]),
    "status": (launch_main, ["status", "PATH"]),
    "logs": (launch_main, ["logs", "x", "--runs", "PATH"]),
    "doctor": (launch_main, ["doctor", "local", "--runs", "PATH"]),
    "reconcile": (launch_main, ["reconcile", "--runs", "PATH"]),
}


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~/x", LATIN1])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_that_cannot_be_is_refused_before_anything_is_written(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, words = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    if path == "~/x":
        unknown_user(monkeypatch)
    assert call([word.replace("PATH", path) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [TextFiles, Jsonl])
def test_files_whose_names_are_not_utf8_are_data(source: Any, tmp_path: Path) -> None:
    for i in range(30):
        text = f"document {i} " * 20
        name = os.fsdecode(f"{i}-".encode() + b"\xe9")
        (tmp_path / name).write_text(text if source is TextFiles else f'{{"text": "{text}"}}\n')
    data = open_data(source(paths=str(tmp_path), seq_len=16), seed=1)
    assert data.validation is not None and data.train.batch(0, 4)["tokens"].shape == (4, 16)


def beats(file: Path) -> object:
    (file.parent / "beats").mkdir()
    file.rename(file.parent / "beats" / "rank-0.json")
    return watchdog.behind({}, 1)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a record": ("run.json", json_files.read_json),
    "a log": ("events.jsonl", json_files.read_lines),
    "a corpus": ("corpus.jsonl", lambda file: open_data(Jsonl(paths=str(file), seq_len=16), seed=1)),
    "a pack": ("pack.json", lambda file: open_data(TextFiles(paths="x", seq_len=16), seed=1, pack_dir=file.parent)),
    "a hub config": ("config.json", lambda file: hub_config.read_config(file.parent)),
    "an export": (trees.META, lambda file: trees.read_meta(file.parent)),
    "clusters": ("clusters.toml", read),
    "factors": ("efficiency.json", efficiency._own),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000], ids=["lists", "objects"])
def test_json_that_is_nested_too_deep_is_the_users_mistake(name: str, text: str, tmp_path: Path) -> None:
    file, reads = READERS[name]
    (tmp_path / file).write_text(f"a = {text}\n" if file.endswith("toml") else f"{text}\n")
    with pytest.raises(UserError):
        reads(tmp_path / file)


@pytest.mark.parametrize("act", ["lock", "link"])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_or_links_is_named(
    act: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((fcntl, "flock") if act == "lock" else (os, "link")), fails)
    with pytest.raises(UserError, match=re.escape(f"on which a process can {act} a file")) as found:
        RunDir(tmp_path).acquire()
    assert "launch doctor" in str(found.value) and "space" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
