"""`portatrain data plan` beside a count of the samples themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.data import open_data
from portatrain.errors import UserError
from portatrain.recipe.loading import load_recipe
from portatrain.training.open_data import data_of

MIXED = '''"""Three sources whose shares change."""

from portatrain import Recipe
from portatrain.data import Mixture, TokenMemmap
from portatrain.optim import AdamW, Constant
from recipes.models.decoder import DecoderConfig


def source(name: str) -> TokenMemmap:
    return TokenMemmap(paths=f"{name}.bin", seq_len=8, vocab=64, separator=0, validation=0.2)


def recipe() -> Recipe:
    return Recipe(
        name="mixed",
        model=DecoderConfig(vocab=64, embed=16, layers=1, heads=2),
        data=Mixture(
            sources=(source("a"), source("b"), source("c")),
            weights=(0.5, 0.3, 0.2),
            block=20,
            schedule=((2, (0.1, 0.0, 0.9)), (3, (0.4, 0.6, 0.0))),
        ),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        steps=13,
        batch=4,
    )
'''


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for name, size in (("a", 900), ("b", 200), ("c", 3000)):
        np.where(np.arange(size) % 25, rng.integers(1, 64, size), 0).astype("<u2").tofile(tmp_path / f"{name}.bin")
    (tmp_path / "mixed.py").write_text(MIXED)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mixed.py"


@pytest.mark.parametrize("steps", [1, 5, 10, 13, 15, 16, 40])
def test_sources_give_what_is_said(mixed: Path, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", str(mixed), "--set", f"steps={steps}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    recipe = load_recipe(str(mixed))
    data = open_data(recipe.data, seed=recipe.seed)
    source = np.concatenate([data.train.batch(step * 4, 4)["source"] for step in range(steps)])
    for row in said["sources"]:
        count = int((source == row["source"]).sum())
        assert (row["samples"], row["tokens"]) == (count, count * 8)
        assert row["epochs"] == count / row["epoch"] and row["share"] == count / (4 * steps)
    assert [row["epoch"] for row in said["sources"]] == [part.windows for part in data.train.parts]
    assert data.validation is not None and said["validation"] == data.validation.windows


@pytest.mark.parametrize("steps", [1, 5, 10, 13, 15, 16, 40])
def test_an_exhausted_source_is_an_error_by_choice(
    mixed: Path, steps: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["data", "plan", str(mixed), "--set", f"steps={steps}", "--json"]
    assert main(words) == 0
    over = [row for row in json.loads(capsys.readouterr().out)["sources"] if row["epochs"] > 1]
    assert main([*words, "--set", "data.exhausted=error"]) == (2 if over else 0)
    error = capsys.readouterr().err
    recipe = replace(load_recipe(str(mixed)), steps=steps)
    chosen = replace(recipe, data=replace(recipe.data, exhausted="error"))
    if not over:
        data_of(chosen, chosen.describe(), tmp_path / "run/data")
        return
    first = over[0]
    said = (
        f"source source-{first['source']} of the mixture (TokenMemmap): expected at most the {first['epoch']} samples"
    )
    assert said in error and f"a run that takes {first['samples']}: {first['epochs']:.2f} epochs" in error
    with pytest.raises(UserError, match="of the mixture"):
        data_of(chosen, chosen.describe(), tmp_path / "run/data")
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_in_words(mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", str(mixed)]) == 0
    out = capsys.readouterr().out
    assert "mixed: 13 steps of 4 samples" in out and "source-1, TokenMemmap('b.bin'):" in out and " epochs of " in out
    assert main(["data", "plan", "tiny-vit", "--set", "steps=60"]) == 0
    out = capsys.readouterr().out
    assert "source-0, Digits: " in out and "tokens" not in out
    assert main(["data", "plan", "no-such-recipe"]) == 2
