"""Describe the continuity check's verdict at a resume in words, and what a change of the recipe did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portatrain.system.json_files import number

COMPARED = ("loss", "mean", "state", "grad", "update", "replay")


def in_words(event: Mapping[str, Any]) -> str:
    """Return the verdict of a `resumed` event, and each figure with its bound; the event may be damaged."""
    parts = [str(event.get("verdict"))]
    if (tensors := event.get("tensors")) == "equal":
        parts.append("every bit of the state equal")
    elif isinstance(tensors, list):
        more = f" and {len(tensors) - 6} more" if len(tensors) > 6 else ""
        parts.append(f"bits different in {', '.join(map(str, tensors[:6]))}{more}")
    for name in COMPARED:
        if event.get(f"{name}_difference") is not None:
            bound = event.get(f"{name}_bound")
            shown = "?" if bound is None else f"{number(bound):.0e}"
            parts.append(f"{name} {number(event[f'{name}_difference']):.1e} (bound {shown})")
    if differs := event.get("differs"):
        parts.append("different: " + (", ".join(map(str, differs)) if isinstance(differs, list) else str(differs)))
    if event.get("accepted"):
        parts.append(f"accepted: {event['accepted']}")
    return ", ".join(parts)


def effect_in_words(event: Mapping[str, Any]) -> str:
    """Return what a change did by itself to loss, gradient and update, from a `change_measured` event, which may be
    damaged."""
    before, after = (found if isinstance(found := event.get(k), Mapping) else {} for k in ("before", "after"))
    names = {"loss": "loss", "grad_norm": "norm of the gradient", "update_norm": "norm of the update"}
    parts = [f"{text} {shown(before.get(name))} to {shown(after.get(name))}" for name, text in names.items()]
    state = event.get("state")
    if isinstance(state, Mapping) and state.get("optimizer"):
        parts.append(f"slots of the optimizer {state['optimizer']}")
    return ", ".join(parts)


def shown(value: object) -> str:
    """Return a number of an event with six digits; '?' if it is none."""
    try:
        return "?" if value is None else f"{number(value):.6g}"
    except ValueError:
        return "?"
