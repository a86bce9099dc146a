"""Runs as records alone, written by hand: what reports and comparisons read, without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def row(step: int, began: int, **more: Any) -> dict[str, Any]:
    """Return a row of metrics.jsonl of an attempt that began with the step `began` and takes 2 s a step."""
    return {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 100 * step,
        "tokens_per_s": 50.0,
        "time_s": 10.0 + 2.0 * (step - began + 1),
        "step_s": 2.0,
        "memory_bytes": 2**30,
        **more,
    }


def attempt(run: Path, number: int, about: dict, rows: list, events: list, plan: dict | None = None) -> None:
    """Write the record of an attempt."""
    folder = run / "attempts" / str(number)
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"attempt": number, **about}))
    for name, lines in (("metrics", rows), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan))
