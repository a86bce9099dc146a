"""A damaged run directory never ends a command in a traceback, and hides no other run.

The damage is generated: every file and folder of the record of a real small run, in every way of being damaged, under
every command that reads it; and every field of every JSON file with values of a wrong type or size.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.cli import launch_main, main
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.recipe.changing import difference
from portatrain.runs import changes
from portatrain.runs.claim import Owner
from portatrain.runs.jobs import Job
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.training.trainer import train
from tests.support.sizes import SIZES

# What a run records is the same on both; torch has nothing to compile.
BACKEND = next(n for n in ("torch", "jax") if not missing(n))
Command = Callable[[], int]
COMMANDS: dict[str, Command] = {
    "status": lambda: launch_main(["status", "bad"]),
    "status --json": lambda: launch_main(["status", "bad", "--json"]),
    "list": lambda: launch_main(["list"]),
    "list --json": lambda: launch_main(["list", "--json"]),
    "logs": lambda: launch_main(["logs", "bad"]),
    "report": lambda: main(["report", "runs/bad", "--out", "page.html"]),
    "resume": lambda: launch_main(["resume", "bad", "--dry-run"]),
    "reconcile": lambda: launch_main(["reconcile", "bad", "--dry-run"]),
    "ckpt ls": lambda: main(["ckpt", "ls", "runs/bad"]),
}
NEW = ("--run", "new", "--dry-run")
FURTHER: dict[str, Command] = {
    "compare": lambda: main(["compare", "good", "bad", "--out", "compared.html"]),
    "compare --json": lambda: main(["compare", "bad", "good", "--json"]),
    "bisect": lambda: main(["bisect", "good", "bad", "--records"]),
    "bisect --json": lambda: main(["bisect", "bad", "good", "--records", "--json"]),
    "fork": lambda: main(["fork", "bad", "--at", "4", "--set", "optimizer.lr=1e-7", *NEW]),
    "fork --json": lambda: main(["fork", "bad", "--at", "4", "--json", *NEW]),
    "surgery": lambda: main(
        ["fork", "bad", "--at", "4", "--set=model.layers=2", "--surgery=layers", "--no-proof", *NEW]
    ),
    "blame": lambda: main(["blame", "bad", "--step", "5", "--dry-run"]),
    "blame --json": lambda: main(["blame", "bad", "--dry-run", "--json"]),
    "a change": lambda: main(["resume", "bad", "--set", "optimizer.lr=1e-7", "--reason", "x", "--dry-run"]),
    "a cluster": lambda: launch_main(["resume", "bad", "--cluster", "local", "--dry-run"]),
    "data verify": lambda: main(["data", "verify", "runs/bad"]),
    "ckpt show": lambda: main(["ckpt", "show", "runs/bad"]),
    "ckpt verify": lambda: main(["ckpt", "verify", "runs/bad", "--json"]),
    "ckpt diff": lambda: main(["ckpt", "diff", "runs/bad", "runs/good"]),
    "calibrate": lambda: main(["plan", "--calibrate", "runs/bad"]),
}
"""Commands that read the record too; each damage meets some of them in turn, and in the long tests all."""
ALL = COMMANDS | FURTHER
FILES = (
    "run.json",
    "changes.json",
    "claim",
    "summary.json",
    "checkpoints.json",
    "DONE",
    "CANCELLED",
    "attempts/1/attempt.json",
    "attempts/1/metrics.jsonl",
    "attempts/1/events.jsonl",
    "attempts/1/plan.json",
    "attempts/2/attempt.json",
    "attempts/2/metrics.jsonl",
    "attempts/2/events.jsonl",
    "attempts/2/rank-0.log",
    "jobs/1.json",
    "checkpoints/step-00000004/COMMIT",
)
FOLDERS = ("attempts", "attempts/1", "attempts/2", "jobs", "checkpoints", "checkpoints/step-00000004", "data")
VALUES: tuple[Any, ...] = (
    None,
    "",
    "x",
    "²",
    "node[/1]\x1b[31m",
    -1,
    0,
    10**30,
    1e300,
    -1e300,
    float("inf"),
    float("nan"),
    True,
    [],
    [[1]],
    {},
    {"a": {"b": None}},
)
TEXTS = ("null", "7", '"x"', "[]", "[1]", "{}", "NaN", "1e999", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "{}\n[]\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/good` and `runs/bad`: the same run of two attempts, with what a job leaves as well."""
    base = tmp_path_factory.mktemp("damaged")
    bad = base / "runs" / "bad"
    recipe = apply_overrides(load_recipe("tiny-lm"), SIZES)
    for stop in (3, 5):
        assert train(recipe, RunDir(bad), backend=BACKEND, stop_at=stop) == 85
    for number in (1, 2):
        (bad / "attempts" / str(number) / "rank-0.log").write_text("a line\n")
    slower = apply_overrides(recipe, ["optimizer.lr=1e-4"])
    change = changes.change(difference(recipe, slower, 5, since=0), slower, 5, reason="slower")
    json_files.write_json(bad / changes.NAME, changes.rows_with(bad, change))
    job = Job(run_dir=str(bad), recipe="tiny-lm", cluster="local", engine="local", overrides=SIZES, backend=BACKEND)
    job.write().submitted("999999999 0")
    shutil.copytree(bad, base / "runs" / "good")
    return base


@pytest.fixture(autouse=True)
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)


def whole_damage(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Ways in which a whole file or folder is damaged: name -> how. Something is at `path`, or nothing."""
    content = path.read_bytes() if path.is_file() else b""

    def put(data: bytes) -> Callable[[], None]:
        return lambda: clear() or (path.write_bytes(data), None)[1]

    def clear() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def folder() -> None:
        clear()
        path.mkdir()

    def link(to: str) -> Callable[[], None]:
        return lambda: clear() or os.symlink(to, path)

    yield "missing", clear
    yield "empty", put(b"")
    yield "binary", put(bytes(range(256)) * 8)
    yield "not UTF-8", put(b'{"event": "\xff\xfe"}\n' * 2)
    yield "a folder", folder
    yield "a link to itself", link(path.name)
    yield "a link to nothing", link("nowhere")
    yield "a link to a folder", link("..")
    if content:
        yield "cut in half", put(content[: len(content) // 2])
        yield "cut by a byte", put(content[:-2])
        yield "twice", put(content + content)
        yield "zeros behind", put(content + b"\0" * 100)
        yield "a byte order mark", put(b"\xef\xbb\xbf" + content)
    if path.suffix != ".log":
        for text in TEXTS:
            yield f"{text[:6]} of {len(text)}", put(text.encode())


def odd_names(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Entries that nobody of ours has made."""
    for name in ("²", "-1", "007", "٣", "9" * 40, "step-²", "step--1", "step-99999999999999999999", "².json", "0.json"):
        yield f"{name} a folder", lambda name=name: (folder / name).mkdir()
        yield f"{name} a file", lambda name=name: (folder / name).write_text("{}")


def field_damage(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every field of a JSON file, or of the first, a middle and the last row of each kind, with every odd value."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    rows = [json.loads(line) for line in lines]
    seen: set[tuple[str, ...]] = set()
    for number, row in enumerate(rows):
        for keys in paths(row):
            mark = (str(row.get("event")), *keys)
            if mark in seen:
                continue
            seen.add(mark)
            for value in VALUES:

                def change(number: int = number, keys: tuple[str, ...] = keys, value: Any = value) -> None:
                    changed = json.loads(lines[number])
                    inner = changed
                    for key in keys[:-1]:
                        inner = inner[key]
                    inner[keys[-1]] = value
                    text = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
                    path.write_text("\n".join(text) + "\n")

                yield f"{'.'.join(keys)} = {value!r:.20}", change
            if len(keys) == 1:

                def drop(number: int = number, key: str = keys[0]) -> None:
                    changed = {k: v for k, v in json.loads(lines[number]).items() if k != key}
                    text = [*lines[:number], json.dumps(changed), *lines[number + 1 :]]
                    path.write_text("\n".join(text) + "\n")

                yield f"without {keys[0]}", drop


def paths(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The fields of a row, and those of its objects, without the whole recipe."""
    for key, value in row.items():
        yield (key,)
        if isinstance(value, dict) and key in ("recipe", "aux", "metrics", "plan", "place", "options", "source"):
            yield from ((key, inner) for inner in list(value)[:12])


def tried(capsysbinary: pytest.CaptureFixture[bytes], name: str, what: str) -> str:
    """Run a command; what it printed. The test fails unless it ends with a code and at most a paragraph."""
    try:
        code = ALL[name]()
    except BaseException as error:  # what the command line would show as a traceback
        raise AssertionError(f"{name} with {what}: {type(error).__name__}: {error}") from error
    out, err = (text.decode(errors="replace") for text in capsysbinary.readouterr())
    assert code in (0, 1, 2, 75), (name, what, code)
    assert "Traceback" not in out + err and len(err.splitlines()) < 10, (name, what, err)
    if name == "list":
        assert "good" in out and code == 0, (what, out, err)
    return out


@pytest.mark.parametrize("file", [*FILES, *FOLDERS])
def test_every_file_in_every_way_under_every_command(
    runs: Path, file: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    bad = runs / "runs" / "bad"
    path = bad / file
    if file == "claim":
        owner = dataclasses.asdict(dataclasses.replace(Owner.this_process(), pid=2**22 - 1))
        path.write_text(json.dumps(owner))
    elif not path.exists() and file.endswith("json"):
        path.write_text('{"url": "s3://nowhere/at-all"}')
    ways = [*whole_damage(path), *(odd_names(path) if path.is_dir() else ())]
    kept = runs / "kept"
    shutil.copytree(bad, kept, symlinks=True)
    turn = itertools.cycle(FURTHER)
    try:
        for number, (what, damage) in enumerate(ways):
            damage()
            for name in (*COMMANDS, *([next(turn)] if number % 3 == 0 else ())):
                tried(capsysbinary, name, f"{file}: {what}")
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            if (kept / file).is_dir():
                shutil.copytree(kept / file, path)
            elif (kept / file).exists():
                shutil.copyfile(kept / file, path)
    finally:
        shutil.rmtree(bad)
        kept.rename(bad)
        if not (runs / "runs" / "good" / file).exists():
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith(("json", "jsonl"))])
def test_every_field_with_odd_values(runs: Path, file: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Each value gets one command in turn: there are more values than commands, so each field meets each command."""
    path = runs / "runs" / "bad" / file
    if not path.exists():
        path.write_text(json.dumps({"url": "s3://nowhere/at-all"}))
    good = path.read_bytes()
    turn = itertools.cycle(ALL if file == changes.NAME else COMMANDS)
    try:
        for what, damage in field_damage(path):
            damage()
            tried(capsysbinary, next(turn), f"{file}: {what}")
    finally:
        path.write_bytes(good)
        if not (runs / "runs" / "good" / file).exists():
            path.unlink()


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", ["changes.json", "run.json", "jobs/1.json"])
def test_every_field_under_every_further_command(
    runs: Path, file: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = runs / "runs" / "bad" / file
    good, turn = path.read_bytes(), itertools.cycle(FURTHER)
    try:
        for number, (what, damage) in enumerate(field_damage(path)):
            damage()
            for name in FURTHER if file == changes.NAME and number % 4 == 0 else [next(turn)]:
                tried(capsysbinary, name, f"{file}: {what}")
    finally:
        path.write_bytes(good)


def test_every_field_of_a_run_of_the_foreground(runs: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Without a job, `resume` goes on from what the last attempt recorded of its command."""
    bad = runs / "runs" / "bad"
    path = bad / "attempts" / "2" / "attempt.json"
    good = path.read_bytes()
    source = {"recipe": "tiny-lm", "overrides": list(SIZES), "cwd": "", "backend": BACKEND, "mesh": None, "devices": 1}
    (bad / "jobs").rename(runs / "jobs-aside")
    try:
        path.write_text(json.dumps({**json.loads(good), "source": source}))
        assert "--set steps=8" in tried(capsysbinary, "resume", "a run of the foreground")
        for what, damage in field_damage(path):
            damage()
            tried(capsysbinary, "resume", what)
    finally:
        path.write_bytes(good)
        (runs / "jobs-aside").rename(bad / "jobs")


def test_markup_in_names_is_text(runs: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    name = "node[/1] [bold]x[/bold]"
    path = runs / "runs" / "bad" / "attempts" / "2" / "attempt.json"
    good = path.read_bytes()
    try:
        path.write_text(json.dumps({**json.loads(good), "host": name, "mesh": "[/]", "backend": "[red]"}))
        assert name in tried(capsysbinary, "status", "markup") and name in tried(capsysbinary, "list", "markup")
    finally:
        path.write_bytes(good)
