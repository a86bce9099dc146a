"""A cluster `here` of this machine on which training is a stand-in that computes nothing (tests/support/fakes)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in `folder`, with a clusters.toml that has the cluster."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("FAKE_STEP_S", "0.04")
    monkeypatch.setenv("FAKES", str(ROOT / "tests" / "support" / "fakes"))
    options = f'{{ python = "{ROOT}/tests/support/fakes/python" }}'
    folder.joinpath("clusters.toml").write_text(
        f'[here]\nchip = "cpu"\ncount = 1\nengine = "local"\noptions = {options}\n'
    )
