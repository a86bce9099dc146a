"""Describe the continuity check's verdict at a resume in words."""

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
