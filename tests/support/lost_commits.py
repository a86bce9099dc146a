"""A run as if it had been killed before a save was committed."""

from __future__ import annotations

import json

from portatrain.checkpoint.locations import step_name
from portatrain.runs.run_dir import RunDir


def lose(run: RunDir, step: int) -> None:
    """Undo the commit of `step`: its COMMIT, and what the record says of it."""
    (run.path / "checkpoints" / step_name(step) / "COMMIT").unlink()
    for number in run.attempt_numbers():
        events = run.path / "attempts" / str(number) / "events.jsonl"
        rows = [row for row in events.read_text().splitlines() if json.loads(row).get("step") != step]
        events.write_text("".join(row + "\n" for row in rows))
