"""The parts of the report on forks, and on changes of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from portatrain.runs.changes import SURGERY
from portatrain.runs.history import History
from portatrain.runs.report.tables import section, table
from portatrain.runs.verdict import shown

Fork = tuple[int, str, int | None]
"""(depth in the tree, name of the run, step of its parent at which it began)."""


def forks(run: History, found: Sequence[Fork]) -> str:
    """Return the tree of forks around a run; '' if there is none."""
    if not found:
        return ""
    lines = []
    for depth, name, step in found:
        at = "" if step is None else f" from step {step}"
        shown = f"<b>{escape(name)}</b>" if name == run.run else escape(name)
        lines.append(f"{'&nbsp;' * 4 * depth}{'└ ' if depth else ''}{shown}{at}")
    return section("Forks", f"<p>{'<br>'.join(lines)}</p>")


def changes(run: History) -> str:
    """Return the changes of the recipe, and what each one that decides the curve did by itself; '' without any."""
    if not run.changes:
        return ""
    rows = []
    for change in run.changes:
        what = "\n".join(f"{name}: {was!r} to {now!r}" for name, (was, now) in sorted(change.fields.items()))
        kind = "the trajectory" if change.decides else "the past stays"
        rows.append((str(change.step), escape(what).replace("\n", "<br>") or "nothing", kind, change.reason))
    body = table(("after step", "fields", "changes", "reason"), rows, raw=(1,))
    did = [(str(e.get("step", "")), *_sides(e)) for e in run.measured]
    if did:
        head = ("after step", "loss", "norm of the gradient", "norm of the update")
        body += f"<p>What the change alone did to the next step:</p>{table(head, did)}"
    if operated := _surgery(run.parent):
        body += f"<p>{escape(operated)}</p>"
    return section("Changes of the recipe", body)


def _surgery(parent: Mapping[str, Any] | None) -> str:
    """Return what a surgery in the fork did to the function of the model; '' without one. The record may be damaged."""
    found = (parent or {}).get(SURGERY)
    proof = found.get("proof") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(proof, Mapping):
        return ""
    words = f"Surgery {found.get('name')}: the function of the model was {proof.get('function')}"
    if "largest_difference" not in proof:
        return f"{words}."
    return (
        f"{words}; largest difference of {proof.get('outputs')} in float64 {shown(proof['largest_difference'])}, on "
        f"{proof.get('samples')} samples, with outputs up to {shown(proof.get('largest_output'))}."
    )


def _sides(event: Mapping[str, Any]) -> tuple[str, ...]:
    """Return 'before to after' for loss, gradient and update; the event may be damaged."""
    before, after = ({} if not isinstance(event.get(k), Mapping) else event[k] for k in ("before", "after"))
    return tuple(f"{shown(before.get(k))} to {shown(after.get(k))}" for k in ("loss", "grad_norm", "update_norm"))
