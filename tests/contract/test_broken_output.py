"""Output that breaks, and a sink that raises, end no run: it is done, committed, and its record is whole."""

from __future__ import annotations

import errno
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.metrics import Sink
from portatrain.training.metrics.console import ConsoleSink
from portatrain.training.trainer import train
from tests.support.counting_texts import recipe_in

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the runs train on torch")

METHODS = [name for name, _ in inspect.getmembers(Sink, inspect.isfunction) if not name.startswith("_")]
ERRORS = {
    "the reader is gone": BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    "the disk is full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "the terminal is gone": OSError(errno.EIO, os.strerror(errno.EIO)),
    "it is closed": ValueError("I/O operation on closed file"),
}


class Breaks:
    """A text stream that takes some characters and raises from then on."""

    encoding = "utf-8"

    def __init__(self, error: Exception, characters: int) -> None:
        self.error, self.left = error, characters

    def write(self, text: str) -> int:
        self.left -= len(text)
        if self.left < 0:
            raise self.error
        return len(text)

    def flush(self) -> None:
        if self.left < 0:
            raise self.error

    def isatty(self) -> bool:
        return False


class Raising:
    """A sink that raises in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            if name == self.method:
                raise AttributeError("'NoneType' object has no attribute 'add_scalar'")

        return call


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_in(tmp_path, "told", checkpoint_every=2)


def assert_whole(run: RunDir) -> None:
    assert run.is_done and run.committed() == 4
    assert [row["step"] for row in run.curve()] == [1, 2, 3, 4]
    assert run.events("end")[-1]["status"] == "done" and run.summary()["status"] == "done"


@pytest.mark.parametrize(("error", "characters"), list(zip(ERRORS, (0, 400, 0, 400), strict=True)))
def test_standard_output_and_error_break(
    error: str, characters: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, broken = RunDir(tmp_path / "run"), Breaks(ERRORS[error], characters)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        patch.setattr(sys, "stderr", broken)
        code = train(recipe, run, backend="torch", sinks=[ConsoleSink()])
    assert broken.left < 0  # it was written to, and raised
    assert code == 0
    assert_whole(run)


def test_a_sink_has_the_methods_that_are_tried() -> None:
    assert sorted(METHODS) == ["end", "eval", "event", "start", "step"]


def test_sinks_that_raise_fail_alone_and_once(recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    sinks: list[Any] = [*map(Raising, METHODS), ConsoleSink()]
    assert train(recipe, run, backend="torch", sinks=sinks) == 0
    assert_whole(run)
    failed = run.events("sink_failed")
    assert len(failed) == len(METHODS) and all(e["sink"] == "Raising" and "add_scalar" in e["why"] for e in failed)
