"""A run on a packed store over two processes, each of which reads its own windows, has the curve of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.data import TextFiles
from portatrain.runs.run_dir import RunDir
from tests.support.packed import RECIPE, corpus, packed

pytestmark = pytest.mark.meshes


def train(run: Path, recipe: Path, store: Path, *how: str) -> list[float]:
    given = [word for one in ("data=PackedTokens", f"data.path={store}", "model.vocab=256") for word in ("--set", one)]
    command = [sys.executable, "-m", "portatrain.cli", "train", str(recipe), "--run-dir", str(run), *given, *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [row["loss"] for row in RunDir(run).curve()]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param([], id="torch"),
        pytest.param(["--backend", "jax", "--processes", "2"], id="jax", marks=pytest.mark.full),
    ],
)
def test_two_processes_have_the_curve_of_one(how: list[str], tmp_path: Path) -> None:
    spec = TextFiles(paths=str(corpus(tmp_path / "corpus")), seq_len=16, validation=0.2)
    packed(spec, tmp_path / "store")
    recipe = tmp_path / "r.py"
    recipe.write_text(RECIPE.format(paths=str(tmp_path / "corpus"), tokenizer=None))
    backend = how or ["--backend", "torch"]
    one = train(
        tmp_path / "one", recipe, tmp_path / "store", *[word for word in backend if word not in ("--processes", "2")]
    )
    two = train(tmp_path / "two", recipe, tmp_path / "store", *backend, "--mesh", "fsdp=2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert abs(a - b) <= 1e-6 * a
