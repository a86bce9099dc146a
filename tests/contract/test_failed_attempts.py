"""An attempt that fails keeps its error, and one whose storage is full ends with 75 and gives the run free."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.cli import launch_main, main
from portatrain.errors import UserError
from portatrain.runs.attempt import Attempt, NullAttempt
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.training import trainer
from tests.support.sizes import SIZES

BACKEND = "torch" if not missing("torch") else "jax"
WORDS = ["train", "tiny-lm", "--backend", BACKEND, *(w for size in SIZES for w in ("--set", size)), "--run-dir"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def failing(step: int, error: Exception) -> Callable[..., Any]:
    whole = backend_class(BACKEND).step

    def fails(self: Any, state: Any, batch: Any, *, step: int, scale: float, _at: int = step) -> Any:
        if step == _at:
            raise error
        return whole(self, state, batch, step=step, scale=scale)

    return fails


@pytest.mark.parametrize(
    "error",
    [RuntimeError("boom [/1]\nand more"), UserError("a thing", expected="x", got="y", do="Do z.")],
    ids=["a bug", "a mistake"],
)
def test_the_error_is_kept_and_shown(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(backend_class(BACKEND), "step", failing(3, error))
        if isinstance(error, UserError):
            assert main([*WORDS, "runs/a"]) == 2
        else:
            with pytest.raises(RuntimeError):
                main([*WORDS, "runs/a"])
    run = RunDir("runs/a")
    text = (run.path / "attempts/1/error.txt").read_text()
    assert str(error).splitlines()[-1] in text and ("Traceback" in text) == (not isinstance(error, UserError))
    end = run.events(Kind.END)[-1]
    assert end["status"] == "failed" and " ".join(str(error).split()) in end["why"] and "\n" not in end["why"]
    found = read_history(run)
    assert found.state == "FAILED" and found.why == end["why"] and found.attempts[0].ended == "failed"
    capsys.readouterr()
    assert launch_main(["status", "a"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "error.txt" in shown and str(error).splitlines()[0][:20] in shown
    assert launch_main(["logs", "a"]) == 0
    assert text.strip().splitlines()[-1] in capsys.readouterr().out
    assert launch_main(["resume", "a", "--dry-run"]) == 0
    assert "portatrain train tiny-lm" in capsys.readouterr().out
    assert launch_main(["resume", "a"]) == 0 and run.is_done


def test_an_error_before_the_first_step_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no state")

    monkeypatch.setattr("portatrain.training.trainer.Trainer._newest", broken)
    with pytest.raises(RuntimeError):
        main([*WORDS, "runs/a"])
    assert RunDir("runs/a").events(Kind.END)[-1]["why"] == "RuntimeError: no state"


def test_the_error_of_another_process_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    folder = run / "attempts" / "1"
    folder.mkdir(parents=True)
    (run / "run.json").write_text('{"recipe": {"steps": 3}}')
    assert NullAttempt(1, folder, 3).keep_error(ValueError("of rank 3")) == "ValueError: of rank 3"
    found = read_history(RunDir(run))
    assert found.state == "FAILED" and found.why == "ValueError: of rank 3"
    NullAttempt(1, tmp_path / "nowhere", 3).keep_error(ValueError("x"))  # which is no further error


# ---- full disks

WRITERS: dict[str, tuple[object, str]] = {
    "rows": (json_files.JsonLines, "append"),
    "files": (json_files, "write_json"),
    "syncs of rows": (json_files.JsonLines, "sync"),
    "syncs": (os, "fsync"),
    "notes": (Attempt, "note"),
}
CASES = [
    *((name, at, errno.ENOSPC) for name in ("rows", "files", "syncs") for at in (0, 2, -1)),
    ("syncs of rows", 0, errno.ENOSPC),
    ("notes", 0, errno.EDQUOT),
]
QUICK = {("rows", 2), ("files", -1), ("syncs", 2), ("syncs of rows", 0)}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How often each writer is called in a run in which nothing fails."""
    found = dict.fromkeys(WRITERS, 0)

    def counting(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*args: Any, **options: Any) -> Any:
            found[name] += 1
            return whole(*args, **options)

        return counts

    with pytest.MonkeyPatch.context() as patched:
        for name, (owner, method) in WRITERS.items():
            patched.setattr(owner, method, counting(name, getattr(owner, method)))
        patched.setattr(trainer, "draw", lambda run: None)  # the picture is no part of the record
        assert main([*WORDS, str(tmp_path_factory.mktemp("counted") / "a")]) == 0
    assert all(found.values())
    return found


@pytest.mark.parametrize(
    ("name", "at", "number"),
    [pytest.param(*c, marks=() if c[:2] in QUICK else pytest.mark.full, id=f"{c[0]} {c[1]}") for c in CASES],
)
def test_a_full_disk_ends_with_75_and_leaves_no_claim(
    name: str, at: int, number: int, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    owner, method = WRITERS[name]
    whole, calls, wanted = getattr(owner, method), [0], at % counted[name]

    def full(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > wanted:  # and it stays full
            raise OSError(number, os.strerror(number), "a file")
        return whole(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, full)
        patched.setattr(trainer, "draw", lambda run: None)
        code = main([*WORDS, "runs/a"])
    said = capsys.readouterr().err
    assert code == 75, said
    assert "Traceback" not in said and os.strerror(number) in said.splitlines()[-1]
    assert not Path("runs/a/claim").exists()
    run = RunDir("runs/a")  # which is done where only the last word of the attempt did not fit
    assert run.is_done or (main([*WORDS, "runs/a"]) == 0 and run.is_done)
