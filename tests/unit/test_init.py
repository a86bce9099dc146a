"""`portatrain init`: every recipe that it writes is linted, loads, plans and trains on both frameworks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.cli import main
from portatrain.commands.init import MODELS
from portatrain.data import Stdlib, TextFiles, TokenMemmap
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing import parity

ROOT = Path(__file__).parents[2]
COMBINATIONS = [(model, data) for model, kinds in MODELS.items() for data in kinds]
CHOSEN = {"text": ["batch=8"], "tokens": ["batch=8"], "images": []}
STEPS = {"text": 8, "tokens": 8, "images": 24}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text files and files of token ids, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        path = tmp_path / "texts" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number}: the quick brown fox jumps over the lazy dog\n" * 20)
    ids = (np.arange(20_000) * 7 % 300).astype("<u2")
    ids.tofile(tmp_path / "small.bin")
    np.save(tmp_path / "small.npy", ids)
    (ids.astype("<u4")).tofile(tmp_path / "wide.bin")
    return tmp_path


def written(name: str, *words: str) -> Recipe:
    assert main(["init", name, *words]) == 0
    return load_recipe(name)


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(("model", "data"), COMBINATIONS)
def test_every_combination_trains_alike_on_both_frameworks(corpus: Path, model: str, data: str) -> None:
    paths = {"text": ["--paths", "texts"], "tokens": ["--paths", "small.bin"], "images": []}[data]
    recipe = apply_overrides(written("my_recipe.py", "--model", model, "--data", data, *paths), CHOSEN[data])
    assert recipe.name == "my-recipe"
    names = [n for n in ("jax", "torch") if not missing(n)]
    batches = parity.batches(recipe, STEPS[data])
    traces = [parity.trace(backend_class(name), recipe, batches) for name in names]
    for trace in traces:
        assert sum(trace.losses[-3:]) / 3 < trace.losses[0] - 0.05
    verdict = parity.compare(*traces, bound=parity.bound_of(recipe, batches))
    assert verdict.loss <= verdict.loss_bound, str(verdict)
    make_program(recipe, mesh="fsdp=2,tensor=2")  # the sizes divide where a user tries it first


@pytest.mark.parametrize(("model", "data"), COMBINATIONS)
def test_what_is_written_is_linted(corpus: Path, model: str, data: str) -> None:
    paths = {"text": ["--paths", "texts"], "tokens": ["--paths", "small.npy", "small.npy"], "images": []}[data]
    assert main(["init", "my_recipe.py", "--model", model, "--data", data, *paths]) == 0
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "ruff",
                *words,
                "--no-cache",
                "--config",
                str(ROOT / "pyproject.toml"),
                "my_recipe.py",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_data_is_what_was_named(corpus: Path) -> None:
    assert isinstance(written("none.py").data, Stdlib)
    assert written("text.py", "--paths", "texts").data == TextFiles(paths="texts", seq_len=128)
    one = written("one.py", "--paths", "texts/1.txt")
    assert one.data == TextFiles(paths="texts/1.txt", seq_len=128, validation=0.0)  # nothing is left to hold out
    for name, dtype in (("small.bin", "uint16"), ("small.npy", "uint16"), ("wide.bin", "uint32")):
        found = written(f"{name.replace('.', '_')}.py", "--data", "tokens", "--paths", name)
        assert found.data == TokenMemmap(paths=name, seq_len=128, vocab=300, dtype=dtype, validation=0.0)
        assert found.model.vocab == 384  # type: ignore[attr-defined]
    two = written("two.py", "--paths", "texts/1.txt", "texts/2.txt")
    assert two.data == TextFiles(paths=("texts/1.txt", "texts/2.txt"), seq_len=128)


def test_a_recipe_named_oddly_gets_a_name_that_a_run_can_have(corpus: Path) -> None:
    assert written("My Model (2).py").name == "my-model-2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["texts/1.txt"], "ends in .py"),
        (["there.py"], "nothing in it was changed"),
        (["nowhere/a.py"], "create it first"),
        (["a.py", "--model", "decoder", "--data", "images"], "--model vision or --model own for images"),
        (["a.py", "--model", "vision", "--data", "text"], "--model decoder or --model own for text"),
        (["a.py", "--data", "tokens"], "--paths train.bin"),
        (["a.py", "--data", "tokens", "--paths", "small.bin", "wide.bin"], "one type"),
        (["a.py", "--data", "tokens", "--paths", "text.npy"], "numpy.save"),
        (["a.py", "--paths", "nothing/here"], "nothing/here"),
        (["a.py", "--model", "vision", "--paths", "texts"], "no paths for images"),
        (["a.py", "--model", "decoders"], "expected one of"),
    ],
)
def test_mistakes_end_in_one_paragraph(
    corpus: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], unchanged: Callable[[Path], None]
) -> None:
    (corpus / "there.py").write_text("mine")
    (corpus / "text.npy").write_text("no array")
    unchanged(corpus)
    assert main(["init", *words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert said in error
