"""Paths, file names and JSON as users have them: each is read, or refused in one paragraph."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import pwd
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import portatrain
from portatrain.checkpoint.interop import hub_config, huggingface, trees
from portatrain.cli import launch_main, main
from portatrain.commands import audit as audit_command
from portatrain.commands import sample
from portatrain.data.chat import chat_template
from portatrain.data.open import open_data
from portatrain.data.spec import Arrow, Jsonl, TextFiles
from portatrain.errors import UserError
from portatrain.plan.clusters.clusters_toml import read
from portatrain.plan.cost import efficiency
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files, watchdog
from portatrain.system.paths import expand, place
from portatrain.testing import audit

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
    "a record of an audit": ("before.json", audit.load),
    "names of an audit": ("names.json", audit_command._names),
    "a tokenizer's facts": ("tokenizer_config.json", lambda file: chat_template(str(file.parent), None)),
    "a dataset": ("state.json", lambda file: open_data(Arrow(paths=str(file.parent), seq_len=16), seed=1)),
    "prompts": ("prompts.jsonl", lambda file: sample._prompts(Namespace(prompt=[], ids=[], prompts=str(file)))),
    "weights": ("model.safetensors.index.json", lambda file: huggingface._files(file.parent)),
}


OWN = ("portatrain/plan/compilers/worker.py", "portatrain/system/processes.py")
"""Modules that read only what another process of the same command wrote."""


def readings(path: Path) -> Iterator[ast.Call]:
    """The calls of json.loads and json.load, without those of text that the module has just made itself, and without
    those in a `try` that knows of JSON that is nested too deep."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    safe: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(h.type and "RecursionError" in ast.unparse(h.type) for h in node.handlers):
            safe |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load") and node not in safe:
            argument = ast.unparse(node.args[0])
            if not argument.startswith("json.dumps(") and not argument.endswith(".as_bytes()"):
                yield node


def test_json_of_others_is_read_by_the_function_that_knows_its_depth() -> None:
    """`json.loads` ends in a RecursionError, which no reader of a damaged file expects; `json_files.loads` does not."""
    root = Path(portatrain.__file__).parents[1]
    files = [*root.glob("portatrain/**/*.py"), *root.glob("launchers/**/*.py")]
    found = [f"{f.relative_to(root)}:{call.lineno}" for f in files for call in readings(f)]
    assert len(files) > 200 and [line for line in found if line.partition(":")[0] not in OWN] == []
    assert {line.partition(":")[0] for line in found} == set(OWN)


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
