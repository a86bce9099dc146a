"""The metrics of layers in the report, such as the load of every expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portatrain.runs.history import History
from portatrain.runs.report.tables import section, table

SHOWN = 16
"""Lists of so many numbers are shown as they are."""


def layers(run: History) -> str:
    """Return the metrics of layers of the last step that has them; '' without any.

    A list of numbers, such as the load of every expert, is shown by the parts of its sum that its largest and its least
    number are, and by how many of its numbers are zero.
    """
    row = next((row for row in reversed(run.curve) if row.get("layers")), None)
    if row is None:
        return ""
    found: Mapping[str, list[Any]] = row["layers"]
    head, columns = ["layer"], []
    for name, values in sorted(found.items()):
        listed = any(isinstance(v, list) for v in values)
        parts = ("largest share", "least share", "zeros", *(("all",) if listed and len(values[0]) <= SHOWN else ()))
        head += [f"{name}: {part}" for part in parts] if listed else [name]
        columns.append([_listed(v)[: len(parts)] if listed else [f"{v:.4g}"] for v in values])
    rows = []
    for layer in range(max(map(len, columns))):
        cells = [column[layer] if layer < len(column) else [""] * len(column[0]) for column in columns]
        rows.append([str(layer), *(cell for part in cells for cell in part)])
    return section(f"Layers at step {row['step']}", table(head, rows))


def _listed(values: list[float]) -> list[str]:
    total = sum(values) or 1.0
    shares = [v / total for v in values]
    return [
        f"{max(shares):.1%}",
        f"{min(shares):.1%}",
        str(sum(v == 0 for v in values)),
        " ".join(f"{v:.4g}" for v in values),
    ]
