"""Format numbers and times as short text for a terminal or a page."""

from __future__ import annotations

import re
import time


def si(value: float) -> str:
    """Return ``value`` with three digits and, if it is large, k, M or G."""
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g} {letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return ``seconds`` as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def age(unix_s: float) -> str:
    """Return the time since `unix_s` as '12 s', '3 min', '2 h' or '5 d'."""

    seconds = max(0.0, time.time() - unix_s)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def counted(number: int, things: str) -> str:
    """Return a number with what it counts, in the right form: '1 file without content', '2,000 files without content'.

    things: the plural. Its first word that ends in s is the noun; `that are` and `them` behind it take its form, too.
    """
    if number != 1:
        return f"{number:,} {things}"
    before, noun, rest = re.split(r"\b(\w+s)\b", things, maxsplit=1)
    noun = f"{noun[:-3]}y" if noun.endswith("ies") else noun[:-1]
    return f"1 {before}{noun}{rest.replace(' that are ', ' that is ').replace(' them', ' it')}"
