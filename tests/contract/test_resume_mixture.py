"""Runs on meshes and over moves: a mixture of experts, and a hybrid of recurrent layers and attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import resume_hybrid
from benchmarks.resume_mixture import LEGS, move, wrong
from portatrain.backends.base import missing

pytestmark = pytest.mark.skipif(
    any(missing(name) for name in ("jax", "torch")), reason="jax and torch are not both installed"
)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_mixture_moves_and_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    row = move(tmp_path)
    print(row)
    assert not wrong(row), row


@pytest.mark.hand
@pytest.mark.timeout(1200)
def test_a_hybrid_has_one_curve_on_every_mesh_and_moves(tmp_path: Path) -> None:
    found = resume_hybrid.curves(tmp_path)
    row = move(tmp_path / "moves", resume_hybrid.FILE, resume_hybrid.LEGS, resume_hybrid.STEPS // 3)
    most, drift = resume_hybrid.bound()
    print(found, row, drift)
    assert all(worst <= most for worst in found.values()), (found, drift)
    assert not wrong(row, resume_hybrid.LEGS, most), (row, drift)


def test_what_is_wrong() -> None:
    good = {"verdicts": ["continuous"] * (len(LEGS) - 1), "worst": 9e-7, "back": "same bits"}
    assert not wrong(good)
    bad = [{"verdicts": ["continuous", "broken"]}, {"worst": float("nan")}, {"worst": 2e-6}, {"back": "1 of 9 differ"}]
    assert all(wrong({**good, **change}) for change in (*bad, {"failed": "leg 1"}))
