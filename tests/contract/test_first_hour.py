"""What somebody types in the first hour, as whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from tests.support import forks

ROOT = Path(__file__).parents[2]
BACKENDS = [n for n in ("jax", "torch") if not missing(n)]
PROGRAM = "import sys; from portatrain.cli import {name} as main; sys.exit(main())"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a corpus of 40 small files."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number} bottles of beer on the wall\n" * 30)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    with forks.serving():
        yield


def in_a_process(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), forks.QUICK: "1"}
    return forks.run([sys.executable, *words], cwd=place, env=env, timeout=280)


def call(place: Path, name: str, *words: str) -> str:
    """What a command prints that is given in the folder `place`."""
    done = in_a_process(place, "-c", PROGRAM.format(name=name), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_shipped_recipe_on_text_of_ones_own(place: Path) -> None:
    changes = ("data.paths=corpus", "data=TextFiles", "optimizer=Muon", "schedule=WSD", "steps=6", "schedule.warmup=1")
    small = ("data.seq_len=64", "model.layers=1", "model.embed=32", "model.mlp=64", "hooks=()", "eval_every=3")
    words = [word for one in (*changes, *small) for word in ("--set", one)]
    out = call(place, "launch_main", "--cluster", "local", "tiny-lm", "--run", "mine", "--backend", BACKENDS[0], *words)
    assert "loss curve       runs/mine/loss.svg" in out
    run = place / "runs" / "mine"
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert recipe["data"] == {
        "class": "portatrain.data:TextFiles",
        "paths": "corpus",
        "seq_len": 64,
        "validation": 0.03,
        "validation_paths": [],
        "tokenizer": None,
        "bos": None,
    }
    assert recipe["optimizer"]["class"].endswith(":Muon") and recipe["optimizer"]["lr"] == 3e-3
    assert recipe["schedule"]["class"].endswith(":WSD")
    ET.fromstring((run / "loss.svg").read_text())


@pytest.mark.skipif(len(BACKENDS) < 2, reason="jax and torch are not both installed")
def test_a_recipe_that_init_wrote_is_launched_and_moves(place: Path) -> None:
    call(place, "main", "init", "my_recipe.py", "--model", "own", "--paths", "corpus")
    assert "my-recipe: 82,112 parameters" in call(place, "main", "show", "my_recipe.py")
    words = ["my_recipe.py", "--run-dir", "runs/moves", "--set", "steps=8", "--set", "schedule.warmup=1"]
    stopped = in_a_process(place, "-m", "portatrain", "train", *words, "--backend", "torch", "--stop-at", "4")
    assert stopped.returncode == 85, stopped.stderr
    before = (place / "runs/moves/loss.svg").read_text()  # drawn at the end of every attempt, by `train` too
    call(place, "main", "train", *words, "--backend", "jax")
    assert (place / "runs/moves/loss.svg").read_text() != before
    lines = [json.loads(line) for line in (place / "runs/moves/attempts/2/events.jsonl").read_text().splitlines()]
    assert [line["verdict"] for line in lines if line["event"] == "resumed"] == ["continuous"]
