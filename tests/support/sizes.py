"""Overrides that make a shipped recipe train in seconds."""

from __future__ import annotations

SIZES = (
    "model.layers=1",
    "model.embed=16",
    "model.mlp=16",
    "data.seq_len=32",
    "batch=4",
    "steps=8",
    "schedule.warmup=1",
    "eval_every=2",
    "eval_batches=1",
    "hooks=()",
    "checkpoint_every=2",
)
