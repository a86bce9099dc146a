"""A file of a run that cannot be read for a moment ends no run for good: exit code 75, and the next attempt goes on.

The cases are the files that an attempt opens: each is refused once as an opened file of a network file system is.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.cli import launch_main, main
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.recipe.changing import difference
from portatrain.runs import changes
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from tests.support.sizes import SIZES

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the runs train on torch")

WORDS = ["train", "mine.py", *(f"--set={size}" for size in SIZES), "--backend=torch"]
SOURCE = """
from dataclasses import replace
from portatrain.data import TextFiles
from recipes.tiny_lm import recipe as tiny_lm

def recipe():
    return replace(tiny_lm(), name="mine", data=TextFiles(paths="texts", seq_len=32, validation=0.2))
"""
Seen = Callable[[str], None]


@contextmanager
def opening(seen: Seen) -> Iterator[None]:
    """Call `seen` with the path of every file that is opened for reading. It may raise."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (builtins, io):

            def opens(file: Any, mode: str = "r", *more: Any, _open: Any = module.open, **options: Any) -> Any:
                if isinstance(file, (str, os.PathLike)) and not set(mode) & set("wax+"):
                    seen(os.path.abspath(os.fsdecode(file)))
                return _open(file, mode, *more, **options)

            patched.setattr(module, "open", opens)
        real = os.open

        def opens_handle(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(path, (str, os.PathLike)):
                folder = options.get("dir_fd")
                base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else ""
                seen(os.path.abspath(os.path.join(base, os.fsdecode(path))))
            return real(path, flags, *more, **options)

        patched.setattr(os, "open", opens_handle)
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its corpus and a run that stopped at step 3 and is changed from there on."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(f"document {i} says {i * i} again. " * 40)
    (folder / "mine.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*WORDS, "--run-dir=run", "--stop-at=3"]) == 85
        recipe = apply_overrides(load_recipe("mine.py"), SIZES)
        slower = apply_overrides(recipe, ["optimizer.lr=1e-4"])
        change = changes.change(difference(recipe, slower, 3, since=0), slower, 3, reason="slower")
        json_files.write_json(Path("run") / changes.NAME, changes.rows_with(Path("run"), change))
    return folder


@pytest.fixture
def here(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened_by(call: Callable[[], int], below: Path) -> list[str]:
    """The files below a folder that a command opens, in order."""
    found: list[str] = []

    def seen(path: str) -> None:
        if Path(path).is_relative_to(below) and Path(path).is_file() and path not in found:
            found.append(path)

    with opening(seen):
        call()
    return [str(Path(path).relative_to(below)) for path in found]


def failing(path: str, number: int, *, times: int = 1) -> Seen:
    left = [times]

    def seen(other: str) -> None:
        if other == path and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), path)

    return seen


@pytest.mark.full
@pytest.mark.parametrize(("number", "times"), [(errno.EIO, 1), pytest.param(errno.ESTALE, -1, marks=pytest.mark.soak)])
def test_a_run_goes_on_after_a_read_error_in_any_of_its_files(
    number: int, times: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = here / "run"
    again = [*WORDS, "--run-dir=run"]
    kept = here / "kept"
    shutil.copytree(run, kept)
    files = opened_by(lambda: main(again), here)
    assert RunDir(run).is_done
    names = {Path(f).name for f in files}
    assert {"run.json", "changes.json", "pack.json", "COMMIT", "events.jsonl"} <= names
    wrong = []
    for file in files:
        if file.endswith(".py"):
            continue
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        capsys.readouterr()
        try:
            with opening(failing(str(here / file), number, times=times)):
                code = main(again)
        except OSError as error:  # a traceback, and exit code 1: tried again too
            code = f"raised {error}"
        said = capsys.readouterr().err
        if code not in (0, 75):
            wrong.append((file, code, said[-300:]))
        elif code == 75 and (main(again) != 0 or not RunDir(run).is_done):
            wrong.append((file, "did not go on", ""))
    assert wrong == []


READERS: dict[str, Callable[[], int]] = {
    "status": lambda: launch_main(["status", "run", "--runs", "."]),
    "list": lambda: launch_main(["list", "--runs", "."]),
    "report": lambda: main(["report", "run", "--out", "page.html"]),
    "ckpt ls": lambda: main(["ckpt", "ls", "run"]),
    "ckpt verify": lambda: main(["ckpt", "verify", "run"]),
    "ckpt show": lambda: main(["ckpt", "show", "run"]),
    "data verify": lambda: main(["data", "verify", "run"]),
    "fork": lambda: main(["fork", "run", "--runs", ".", "--at", "3", "--run", "new", "--dry-run"]),
    "resume": lambda: main(["resume", "run", "--runs", ".", "--dry-run"]),
    "blame": lambda: main(["blame", "run", "--runs", ".", "--step", "3", "--dry-run"]),
}


@pytest.mark.parametrize("name", READERS)
def test_no_read_error_is_called_damage(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that only reads says what it could not read; it has found nothing wrong with it."""
    files = opened_by(READERS[name], here / "run")
    wrong = []
    for file in files:
        capsys.readouterr()
        with opening(failing(str(here / "run" / file), errno.EIO, times=-1)):
            code = READERS[name]()
        out, err = capsys.readouterr()
        if "DAMAGED" in out or "damaged" in out + err or code not in (0, 75) or "Traceback" in err:
            wrong.append((file, code, (out + err)[-300:]))
    assert files and wrong == []


WRITERS: dict[str, tuple[str, Callable[[], int]]] = {
    "fork": ("new", lambda: main(["fork", "run", "--runs", ".", "--at", "3", "--run", "new"])),
    "import": ("new", lambda: main(["ckpt", "import", "dcp", *WORDS[1:-1], "--run-dir", "new", "--from", "dcp"])),
    "export": ("new", lambda: main(["ckpt", "export", "run", "new", "--to", "torch"])),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_of_a_command_that_writes(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each link, sync, rename and opened file is refused in turn; the same command works afterwards."""
    written, call = WRITERS[name]
    (here / "run" / changes.NAME).unlink()
    assert main(["ckpt", "export", "run", "dcp", "--to", "dcp"]) == 0
    real = {act: getattr(os, act) for act in ("link", "fsync", "replace", "rename", "open", "mkdir")}
    wanted, count = -1, 0

    def acting(act: str) -> Callable[..., Any]:
        def acts(*args: Any, **options: Any) -> Any:
            nonlocal count
            if act != "open" or args[1] & (os.O_CREAT | os.O_WRONLY):
                count += 1
                if count == wanted:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[act](*args, **options)

        return acts

    wanted, tried = 0, 0
    while True:
        wanted, count = wanted + 1, 0
        shutil.rmtree(here / written, ignore_errors=True)
        capsys.readouterr()
        with monkeypatch.context() as patched:
            for act in real:
                patched.setattr(os, act, acting(act))
            code = call()
        said = capsys.readouterr().err
        if count < wanted:
            assert code == 0, said
            break
        tried += 1
        assert "Traceback" not in said and (code == 0 or (code in (2, 75) and "error: " in said)), (wanted, code, said)
        if code:
            assert not (here / written).exists() or not list((here / written).iterdir()), (wanted, said)
    assert tried > 2
