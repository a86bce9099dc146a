"""Hooks that refuse a recipe or raise, and what is said of checkpoint_keep_best, in small runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from portatrain.backends.base import missing
from portatrain.data import DataSpec, Mixture, Stdlib
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.hook_calls import HookCalls
from portatrain.training.hooks import Hook, TextSample, TrigramBaseline
from portatrain.training.trainer import train
from recipes.models.decoder import DecoderConfig
from tests.support.counting_texts import recipe_in

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the runs train on torch")


@dataclass(frozen=True, kw_only=True)
class Raises(Hook):
    """Raises an error in one of its methods."""

    method: str

    def _in(self, method: str) -> None:
        if method == self.method:
            raise ValueError("no such sensor")

    def check(self, recipe: Recipe, definition: Definition) -> None:
        self._in("check")

    def on_start(self, run: Any) -> None:
        self._in("on_start")

    def on_step(self, run: Any, record: Any) -> None:
        self._in("on_step")

    def on_evaluation(self, run: Any, record: Any) -> None:
        self._in("on_evaluation")

    def on_save(self, run: Any) -> None:
        self._in("on_save")

    def on_end(self, run: Any) -> Mapping[str, Any]:
        self._in("on_end")
        return {"steps_seen": run.step}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_in(tmp_path, "hooked")


@pytest.mark.parametrize("method", ["check", "on_start", "on_step", "on_evaluation", "on_save"])
def test_a_hook_that_raises_ends_the_attempt_by_name(method: str, recipe: Recipe, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=rf"hook Raises.{method} .*in Raises._in.*no such sensor") as error:
        train(replace(recipe, hooks=(Raises(method=method),)), run, backend="torch")
    assert run.path.exists() == (method != "check")
    if method != "check":
        assert run.events("end")[-1]["status"] == "failed" and str(error.value) in run.events("end")[-1]["why"]


def test_a_hook_that_raises_at_the_end_leaves_the_run_done(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    hooks = (Raises(method="on_end"), Raises(method=""))
    assert train(replace(recipe, hooks=hooks), run, backend="torch") == 0
    (failed,) = run.events("hook_failed")
    assert (failed["hook"], failed["method"]) == ("Raises", "on_end")
    assert failed["why"].startswith("ValueError: no such sensor")
    assert capsys.readouterr().err.count("hook Raises failed in on_end: ValueError: no such sensor") == 1
    assert run.summary()["status"] == "done" and run.summary()["steps_seen"] == 4


def test_a_long_error_at_the_end_keeps_its_line() -> None:
    class Long(Hook):
        def on_end(self, run: Any) -> Mapping[str, Any]:
            raise ValueError("x" * 2000)

    said: list[str] = []
    view = SimpleNamespace(recipe=SimpleNamespace(hooks=(Long(),)), process=1)
    view.event = lambda kind, **fields: said.append(fields["why"])
    assert HookCalls(view).end(lambda: False) == {}  # type: ignore[arg-type]
    assert len(said[0]) < 700 and "test_hooks.py, line" in said[0]


@dataclass(frozen=True, kw_only=True)
class Mute(DecoderConfig):
    """A decoder without `predict`."""

    def build(self) -> Any:
        model = super().build()
        model.predict = None
        return model


def test_shipped_hooks_refuse_what_they_do_not_fit(recipe: Recipe, tmp_path: Path) -> None:
    tokenized: DataSpec = Stdlib(seq_len=16, tokenizer="bpe.json")
    both = Mixture(sources=(recipe.data, tokenized), weights=(1.0, 1.0))
    cases = [
        (TextSample(), {"data": tokenized}, "Stdlib with tokenizer=bpe.json"),
        (TrigramBaseline(), {"data": tokenized}, "Stdlib with tokenizer=bpe.json"),
        (TextSample(), {"data": both}, "Stdlib with tokenizer=bpe.json"),
        (TrigramBaseline(), {"data": replace(both, sources=(recipe.data,) * 2)}, "got Mixture, which has no single"),
        (TextSample(), {"model": Mute(vocab=256, embed=16, layers=1, heads=2)}, r"a method predict\(ops, batch\)"),
    ]
    for hook, change, said in cases:
        with pytest.raises(UserError, match=rf"hook {type(hook).__name__} of recipe hooked: .*{said}"):
            train(replace(recipe, hooks=(hook,), **change), RunDir(tmp_path / "run"), backend="torch")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("best", "every", "said"),
    [
        ("min:loss", 2, []),
        ("min:loss", 3, ["none is saved right after an evaluation"]),
        ("min:loss", None, ["none is saved right after an evaluation"]),
        ("max:acuracy", 2, ["an evaluation gives no acuracy, but bits_per_byte, loss"]),
    ],
)
def test_what_is_said_of_keep_best(
    best: str, every: int | None, said: list[str], recipe: Recipe, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    assert train(replace(recipe, checkpoint_keep_best=best, checkpoint_every=every), run, backend="torch") == 0
    warned = [event["what"] for event in run.events("warning")]
    assert len(warned) == len(said)
    for text, part in zip(warned, said, strict=True):
        assert text.startswith(f"checkpoint_keep_best={best} keeps no checkpoint: ") and part in text
