"""Predict published speeds before the planner can be adjusted to them, and keep the predictions.

    python -m benchmarks.plan_blind               # the predictions that were kept, beside those of the planner as it is
    python -m benchmarks.plan_blind --freeze      # predict rows that have no prediction yet, and keep it, with the date

A prediction that was kept is never made again: docs/measured/plan-blind.json only grows. A row is predicted twice: in
the planner's own configuration (mesh, batch, remat policy), and in the publisher's.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.plan_held_out import HELD_OUT
from benchmarks.plan_published import predict, searched
from benchmarks.plan_published_rows import Row
from portatrain.plan.cost import efficiency
from portatrain.plan.result import Candidate

KEPT = Path(__file__).parents[1] / "docs" / "measured" / "plan-blind.json"


def name(row: Row) -> str:
    """Return the name of a row in the file: what was run, on what, and how fast."""
    return f"{row.model} {row.cluster} {row.precision} {row.tokens:g}"


def predictions(row: Row) -> dict[str, Any]:
    """Return what the planner as it is says of a row, at the factor that was fitted without it."""
    factor = efficiency.published(row.on.chip)
    found = {"factor": factor.value, "factor_from": factor.basis}
    return found | {"planners": _one(*searched(row, factor.value)), "publishers": _one(*predict(row, factor.value))}


def _one(tokens: float, best: Candidate) -> dict[str, Any]:
    return {
        "tokens": round(tokens, 1),
        "mesh": best.mesh_text,
        "remat": best.remat,
        "rows": best.rows,
        "accumulation": best.accumulation,
        "memory_gib": round(best.memory.total / 2**30, 1),
    }


def kept() -> dict[str, dict[str, Any]]:
    """Return the predictions that were kept, by the name of their row."""
    found: dict[str, dict[str, Any]] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {}
    return found


def freeze(today: str) -> list[str]:
    """Predict the rows that have no prediction yet, keep it, and return their names."""
    have = kept()
    new = [row for row in HELD_OUT if name(row) not in have]
    for row in new:
        said = {"date": today, "chips": row.on.chips, "published": row.tokens}
        have[name(row)] = said | predictions(row)
    if new:
        KEPT.write_text(json.dumps(have, indent=1) + "\n", encoding="utf-8")
    return [name(row) for row in new]


def main() -> int:
    if "--freeze" in sys.argv[1:]:
        for one in freeze(datetime.now(UTC).date().isoformat()):
            print(f"kept: {one}")
    have = kept()
    for row in HELD_OUT:
        then, now = have.get(name(row)), predictions(row)
        for way in ("planners", "publishers"):
            parts = [f"{name(row)}: {way} configuration"]
            for label, said in (("blind", then), ("now", now)):
                if said:
                    one = said[way]
                    error = 100 * (one["tokens"] / row.tokens - 1)
                    parts.append(f"{label} {one['tokens']:.0f} ({error:+.1f} %; {one['mesh']}, {one['remat']})")
            print("; ".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
