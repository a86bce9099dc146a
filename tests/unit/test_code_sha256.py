"""The hash of the code that a run records covers every room of the package, and the recipe's own modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
from portatrain.recipe import load_recipe
from portatrain.runs.run_dir import code_sha256
print(code_sha256(load_recipe("tiny-lm")))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("portatrain", "launchers", "recipes", "checkpoints_format"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def hash_of(folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "changed",
    [
        "portatrain/model/layout.py",
        "portatrain/runs/run_dir.py",
        "portatrain/backends/torch/__init__.py",
        "portatrain/errors/__init__.py",
        "recipes/models/decoder.py",
    ],
)
def test_a_change_in_any_room_changes_it(changed: str, copy: Path) -> None:
    file = copy / changed
    source = file.read_bytes()
    before = hash_of(copy)
    try:
        file.write_bytes(source + b"# changed\n")
        assert hash_of(copy) != before
    finally:
        file.write_bytes(source)
    assert hash_of(copy) == before
