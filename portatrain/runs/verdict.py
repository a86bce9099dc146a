"""The continuity check's verdict on a seam, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPARED = ("loss", "mean", "state", "grad", "update", "replay")


def in_words(event: Mapping[str, Any]) -> str:
    """Return the verdict of a `resumed` event and its figures beside their bounds."""
    parts = [str(event.get("verdict"))]
    for name in COMPARED:
        if event.get(f"{name}_difference") is not None:
            parts.append(f"{name} {event[f'{name}_difference']:.1e} (bound {event[f'{name}_bound']:.0e})")
    if event.get("differs"):
        parts.append("different: " + ", ".join(map(str, event["differs"])))
    if event.get("accepted"):
        parts.append(f"accepted: {event['accepted']}")
    return ", ".join(parts)
