"""Frequencies of rotary positions, beyond theta: plain Python, so that recipes stay light."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary positions (Meta AI 2024, `rope_type: llama3` in transformers).

    A frequency that turns at least ``high`` times within ``original`` positions stays as it is, one that turns at
    most ``low`` times is divided by ``factor``; between them the two are mixed, linearly in the number of turns.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def applied(self, frequencies: Any) -> Any:
        """The stretched frequencies (radians a position); an array of any kind that has ``clip``."""
        turns = self.original / (2 * math.pi) * frequencies
        kept = ((turns - self.low) / (self.high - self.low)).clip(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)
