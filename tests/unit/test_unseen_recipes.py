"""`launch` checks a recipe that it has not seen, refuses it if its numbers would differ, and remembers it otherwise."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from portatrain.cli import launch_main, main
from portatrain.commands import check as check_command
from portatrain.commands import unseen
from portatrain.errors import UserError
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.testing.recipe_check import properties
from portatrain.testing.recipe_check import run as check
from portatrain.testing.recipe_check.report import Report, Row
from portatrain.training.start_times import StartTimes
from tests.support import planted

ROOT = Path(__file__).parents[2]

RECIPE = """
from tests.support.planted import recipe as planted


def recipe():
    return planted({kind!r})
"""


PRINTS = """
import os
from dataclasses import dataclass, replace

from tests.support.planted import Base, recipe as planted

print("printed by the file")
os.write(1, b"written by a library\\n")


class Net(Base):
    def __init__(self):
        print("printed by __init__")
        super().__init__()

    def __call__(self, ops, batch):
        print("printed by __call__")
        return super().__call__(ops, batch)


@dataclass(frozen=True)
class Config:
    def build(self):
        return Net()


def recipe():
    return replace(planted("nothing"), model=Config())
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `launch` runs as checks. They run in this process and in the oracle alone; nothing trains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PORTATRAIN_CHECK", "1")
    monkeypatch.setattr("portatrain.commands.foreground.run", lambda job: 0)
    whole = check.check_recipe
    monkeypatch.setattr(check, "check_recipe", lambda recipe, **_: whole(recipe, backends=()))
    monkeypatch.setattr(check, "on_cpu", lambda: None)
    made: list[list[str]] = []

    def noted(words: list[str], **_: Any) -> Any:
        made.append(words)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(words[3:])
        return subprocess.CompletedProcess(words, code, stdout=out.getvalue())

    monkeypatch.setattr(unseen.subprocess, "run", noted)
    return made


def launch(kind: str, *more: str) -> int:
    Path("own.py").write_text(RECIPE.format(kind=kind))
    return launch_main(["--cluster", "local", "own.py", *more])


def test_the_time_of_a_check_is_not_counted_as_import(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StartTimes, "_earlier", {})
    assert launch("nothing") == 0 and len(asked) == 1
    assert 0 < StartTimes._earlier["check"] < 60
    StartTimes._earlier["check"] = 0.25
    monkeypatch.setattr(StartTimes, "_process_is_new", True)
    times = StartTimes()
    times.mark("import")
    found = times.fields()
    assert list(found["parts"]) == ["check", "import"] and found["parts"]["check"] == 0.25
    assert sum(found["parts"].values()) == pytest.approx(found["total_s"], abs=1e-6)
    again = StartTimes()
    again.mark("devices")
    assert list(again.fields()["parts"]) == ["devices"]


def test_a_fault_is_refused_and_not_remembered(asked: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert launch("an einsum of two samples") == 2
        said = capsys.readouterr().err
        assert "op ops.einsum('be,ce->bc')" in said and "--no-check" in said
    assert len(asked) == 2
    assert launch("an einsum of two samples", "--no-check") == 0
    assert len(asked) == 2


def test_a_sound_recipe_is_checked_once(asked: list[list[str]]) -> None:
    assert launch("nothing", "--set", "steps=3") == 0
    (words,) = asked
    assert words[1:5] == ["-m", "portatrain", "check", "own.py"] and words[-2:] == ["--set", "steps=3"]
    assert launch("nothing", "--set", "steps=5", "--set", "seed=2", "--run", "b") == 0
    assert len(asked) == 1
    assert launch("nothing", "--set", "optimizer=Lion", "--run", "c") == 0
    assert len(asked) == 2


def test_the_check_comes_before_the_data_is_opened(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus may take minutes to read; the check reads none."""

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("the data was opened")

    monkeypatch.setattr("portatrain.training.open_data.open_data", opened)
    monkeypatch.setattr("portatrain.commands.foreground.run", lambda job: 40 + len(asked))
    assert launch("nothing") == 41


def test_a_recipe_that_prints_is_checked_too(asked: list[list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(PRINTS)
    for run in "ab":
        assert launch_main(["--cluster", "local", "own.py", "--run", run]) == 0
    assert len(asked) == 1
    Path("again.py").write_text(PRINTS)  # another file, which is loaded in the check
    capfd.readouterr()
    assert main(["check", "again.py", "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["found"] == []
    for who in ("printed by the file", "written by a library", "printed by __init__", "printed by __call__"):
        assert who in said.err


def test_an_axis_is_a_warning(asked: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("a misspelt axis") == 0
    assert "axis 'mpl'" in capsys.readouterr().err
    assert len(asked) == 1


def test_shipped_recipes_have_been_seen(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for more in ((), ("--set", "optimizer=Muon"), ("--run", "named", "--set", "model.layers=8")):
        assert launch_main(["--cluster", "local", "tiny-lm", *more]) == 0
    assert asked == []
    monkeypatch.setenv("PORTATRAIN_CHECK", "0")
    assert launch("an einsum of two samples", "--run", "off") == 0
    assert asked == []


def test_brackets_stay_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    about = "op ops.einsum('b[bold]') in [/a]"
    check_command._print(Report(recipe="a", sizes="", rows=[Row(name="forward pass", status="found", about=about)]))
    assert about in capsys.readouterr().out


def test_a_hook_or_schedule_of_ones_own_has_no_effect(asked: list[list[str]]) -> None:
    text = """
        from dataclasses import dataclass, replace
        from portatrain import Hook
        from portatrain.optim.schedules import Constant
        from portatrain.recipe import load_recipe

        @dataclass(frozen=True, kw_only=True)
        class Mine(Hook):
            pass

        @dataclass(frozen=True, kw_only=True)
        class Own(Constant):
            pass

        def recipe():
            return replace(load_recipe("tiny-lm"), hooks=(Mine(),), schedule=Own())
        """
    Path("own.py").write_text(textwrap.dedent(text))
    assert unseen.only_ours(load_recipe("own.py"))
    assert launch_main(["--cluster", "local", "own.py"]) == 0
    assert asked == []


def test_what_a_check_depends_on(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(RECIPE.format(kind="nothing"))
    recipe = planted.recipe()
    key = unseen.key_of(recipe, str(file))
    assert unseen.key_of(apply_overrides(recipe, ["steps=9", "eval_every=2"]), str(file)) == key
    assert unseen.key_of(planted.recipe("max"), str(file)) != key
    file.write_text(RECIPE.format(kind="nothing") + "# changed\n")
    assert unseen.key_of(recipe, str(file)) != key
    assert unseen.only_ours(load_recipe("tiny-lm")) and not unseen.only_ours(recipe)


def test_a_check_depends_on_the_code_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is in another folder than the recipe, whose own class only builds the package's model."""
    package = tmp_path / "site" / "lab_nets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("WIDTH = 1\n")
    (package / "nets.py").write_text(
        "from lab_nets import parts\nfrom tests.support.planted import Base\n\n\nclass Net(Base):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    file = tmp_path / "folder" / "own.py"
    file.parent.mkdir()
    file.write_text(PRINTS.replace("return Net()", "from lab_nets.nets import Net\n\n        return Net()"))
    recipe = load_recipe(str(file))
    key = unseen.key_of(recipe, str(file))
    assert unseen.key_of(recipe, str(file)) == key
    (package / "parts.py").write_text("WIDTH = 2\n")
    assert unseen.key_of(recipe, str(file)) != key


def test_a_check_that_fails_stops_no_launch(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = subprocess.CompletedProcess([], 3, stdout=json.dumps({"found": []}))
    monkeypatch.setattr(unseen.subprocess, "run", lambda words, **_: ended)
    assert launch("nothing") == 0
    assert "exit code 3" in capsys.readouterr().err


def test_a_check_that_fails_on_the_way_is_not_remembered(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reached(subject: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(properties, "reached", reached)
    for run in "ab":
        assert launch("nothing", "--run", run) == 0
        assert "The check itself failed" in capsys.readouterr().err
    assert len(asked) == 2


def test_train_names_the_check_of_an_unseen_recipe(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("portatrain.training.trainer.train", lambda *_, **__: 0)
    Path("own.py").write_text(RECIPE.format(kind="nothing"))

    def said(*words: str) -> str:
        assert main(["train", "own.py", "--run-dir", "run", "--backend", "torch", *words]) == 0
        return capsys.readouterr().err

    (line,) = said("--set", "steps=3").splitlines()
    assert line.endswith(": portatrain check own.py --set steps=3")
    assert asked == []  # it does not wait for a check
    monkeypatch.setenv("PORTATRAIN_CHECK", "0")
    assert said() == ""
    monkeypatch.setenv("PORTATRAIN_CHECK", "1")
    monkeypatch.setenv("PORTATRAIN_CLUSTER", '{"engine": "slurm"}')
    assert said() == ""  # a job: `launch` has checked it
    monkeypatch.delenv("PORTATRAIN_CLUSTER")
    assert main(["check", "own.py"]) == 0
    capsys.readouterr()
    assert said() == ""


def test_a_check_that_finds_a_fault_or_tries_one_framework_is_not_remembered(
    asked: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, words in (("an einsum of two samples", ()), ("nothing", ("--backends", "torch"))):
        Path("own.py").write_text(RECIPE.format(kind=kind))
        main(["check", "own.py", *words])
        assert not list(Path("cache").rglob("*.json")), kind


@pytest.mark.parametrize("kind", ["a mean over the microbatch", "a mean that is tallied", "an einsum of two samples"])
def test_train_refuses_losses_of_a_microbatch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only under accumulation, only if the recipe was not checked, and only if checks are on."""
    recipe = planted.recipe(kind, accumulation=2)
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(RECIPE.format(kind=kind))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PORTATRAIN_CHECK", "1")
    args = argparse.Namespace(recipe="own.py", overrides=[])
    with pytest.raises(UserError, match="accumulation=2") as refused:
        unseen.suggest(recipe, args)
    assert "PORTATRAIN_CHECK=0" in refused.value.do
    unseen.suggest(planted.recipe(kind), args)
    unseen.suggest(planted.recipe("nothing", accumulation=2), args)
    assert capsys.readouterr().err.count("has not been checked") == 2
    monkeypatch.setenv("PORTATRAIN_CHECK", "0")
    unseen.suggest(recipe, args)
