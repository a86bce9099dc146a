"""`portatrain sample` on a model that reads something else than tokens says so, and names no line to correct."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from portatrain.cli import main
from tests.support.running import BACKENDS

SMALL = (
    "steps=1",
    "schedule.warmup=0",
    "batch=4",
    "model.layers=1",
    "eval_every=none",
    "eval_final_batches=1",
    "hooks=()",
)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="the digits are scikit-learn's")
@pytest.mark.parametrize("more", [[], ["--no-cache"]], ids=["cache", "no cache"])
def test_a_model_of_images_continues_no_text(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, backend = str(tmp_path / "run"), f"--backend={BACKENDS[-1]}"
    assert main(["train", "tiny-vit", "--run-dir", run, backend, *(f"--set={size}" for size in SMALL)]) == 0
    capsys.readouterr()
    assert main(["sample", run, "--ids", "1,2", "--max-tokens", "2", backend, *more]) == 2
    said = capsys.readouterr().err
    assert "reads 'image' of the batch. Only a model of tokens continues texts" in said and "vit.py" not in said
