"""Scaling of rotary frequencies for long contexts. Plain Python, since recipes import it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (Meta AI 2024, `rope_type: llama3` in transformers).

    With turns = original * frequency / (2 pi), a frequency of at least ``high`` turns does not change and one of at
    most ``low`` turns is divided by ``factor``. Between them, the two are interpolated linearly in the number of turns.
    """

    factor: float
    """Divisor of the lowest frequencies."""
    low: float = 1.0
    """Turns within ``original`` positions up to which a frequency is divided by the whole factor."""
    high: float = 4.0
    """Turns within ``original`` positions from which a frequency does not change."""
    original: int = 8192
    """Context length, in positions, for which the model was trained first."""

    def applied(self, frequencies: Any) -> Any:
        """Return the scaled frequencies, in radians per position; any array type that has ``clip``."""

        turns = self.original / (2 * math.pi) * frequencies
        kept = ((turns - self.low) / (self.high - self.low)).clip(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)
