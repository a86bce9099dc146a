"""A tiny-lm that trains in seconds, and the losses of its run."""

from __future__ import annotations

from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir

SMALL = [
    "model.layers=2",
    "model.embed=32",
    "model.mlp=64",
    "model.dropout=0.1",
    "data.seq_len=64",
    "batch=8",
    "accumulation=2",
    "steps=12",
    "schedule.warmup=2",
    "eval_every=none",
    "hooks=()",
    "ema_decay=0.9",
]


def small(*more: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), [*SMALL, *more])


def losses(run: RunDir) -> list[float]:
    curve = run.curve()
    assert [row["step"] for row in curve] == list(range(1, len(curve) + 1))
    return [row["loss"] for row in curve]
