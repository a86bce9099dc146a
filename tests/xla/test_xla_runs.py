"""torch-xla in whole runs: what it refuses before anything is allocated, and a run that moves to and from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.runs.run_dir import RunDir

if missing("torch-xla"):
    pytest.skip("torch_xla is not installed: `make test-xla` has an environment for it", allow_module_level=True)

SIZES = [
    "steps=8",
    "schedule.warmup=2",
    "batch=16",
    "accumulation=2",
    "model.layers=2",
    "model.embed=32",
    "model.dropout=0.1",
]


def _train(run: Path, *more: str, recipe: str = "tiny-vit") -> subprocess.CompletedProcess[str]:
    sizes = [word for size in SIZES for word in ("--set", size)]
    words = [sys.executable, "-m", "portatrain.cli", "train", recipe, "--run-dir", str(run), *sizes, *more]
    there = {**os.environ, "PJRT_DEVICE": "CPU"}
    there.pop("CPU_NUM_DEVICES", None)
    return subprocess.run(words, capture_output=True, text=True, timeout=560, check=False, env=there)


@pytest.mark.timeout(1200)
def test_a_run_moves_to_torch_xla_and_back_on_one_curve(tmp_path: Path) -> None:
    alone = _train(tmp_path / "one", "--backend", "torch")
    assert alone.returncode == 0, alone.stderr
    moves = [
        ("2", ["--backend", "torch"]),
        ("4", ["--backend", "torch-xla", "--mesh", "fsdp=2,tensor=2"]),
        ("6", ["--backend", "torch-xla", "--mesh", "fsdp=4"]),
        ("8", ["--backend", "torch"]),
    ]
    for stop, how in moves:
        done = _train(tmp_path / "moved", "--stop-at", stop, *how)
        assert done.returncode in (0, 85), done.stderr
        assert "Traceback" not in done.stderr
    run = RunDir(tmp_path / "moved")
    assert [seam["verdict"] for seam in run.events("resumed")] == ["continuous"] * 3
    one, two = RunDir(tmp_path / "one").curve(), run.curve()
    assert [r["step"] for r in two] == [r["step"] for r in one] == list(range(1, 9))
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * a["loss"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--devices", "4", "--processes", "2"], "2 processes on the torch-xla backend: expected one process"),
        (["--set", "remat=dots"], "remat 'dots' on the torch-xla backend: expected none or block"),
    ],
)
def test_what_it_cannot_do_is_one_paragraph(more: list[str], said: str, tmp_path: Path) -> None:
    done = _train(tmp_path / "run", "--backend", "torch-xla", *more)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_compiled_blocks_are_refused() -> None:
    import dataclasses

    from portatrain.backends.torch_xla import XlaBackend
    from portatrain.errors import UserError
    from tests.support.mesh_cases import CASES

    with pytest.raises(UserError, match="compile on the torch-xla backend: expected no choice"):
        XlaBackend(dataclasses.replace(CASES["lm"].program(""), compile=True))
