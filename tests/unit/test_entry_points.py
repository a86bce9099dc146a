"""Entry points of other packages: read once, and again after a package came or went."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from portatrain.system import plugins

GROUP = "portatrain.trackers"


def install(folder: Path, name: str, points: str) -> Path:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    return info


def names(folder: Path) -> set[str]:
    os.utime(folder, ns=(0, folder.stat().st_mtime_ns + 1))  # for file systems with coarse times
    return {point.name for point in plugins.entry_points(GROUP)}


def test_packages_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = names(tmp_path)
    info = install(tmp_path, "one", f"[{GROUP}]\nnew-one = lab:One\n[other.group]\nx = lab:X\n")
    assert names(tmp_path) == before | {"new-one"}
    assert "x" not in {point.name for point in plugins.entry_points()}
    shutil.rmtree(info)
    assert names(tmp_path) == before


def test_the_metadata_of_packages_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    real = plugins._metadata().entry_points
    monkeypatch.setattr(plugins._metadata(), "entry_points", lambda: (calls.append(None), real())[1])
    plugins._read.cache_clear()
    for _ in range(3):
        plugins.entry_points(GROUP)
        plugins.entry_points()
    assert len(calls) == 1
