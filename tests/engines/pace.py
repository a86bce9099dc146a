"""A hook that makes steps slow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from portatrain.training.hooks import Hook


@dataclass(frozen=True, kw_only=True)
class Pace(Hook):
    """Sleeps after every step."""

    seconds: float

    def on_step(self, trainer: Any, record: Any) -> None:
        time.sleep(self.seconds)
