"""`portatrain train` on a small tiny-vit, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SIZES = ["steps=8", "schedule.warmup=2", "batch=16", "accumulation=2", "model.layers=2", "model.embed=32"]


def command(run: Path, *more: str) -> list[str]:
    sizes = [word for size in SIZES for word in ("--set", size)]
    words = ["tiny-vit", "--backend", "torch", "--run-dir", str(run)]
    return [sys.executable, "-m", "portatrain.cli", "train", *words, *sizes, *more]


def train(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run, *more), capture_output=True, text=True, timeout=200, check=False)
