"""A recipe with a field of every kind, for tests that train nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from portatrain.data import Stdlib
from portatrain.optim import AdamW
from portatrain.optim.schedules import Constant
from portatrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A stand-in for a model's sizes with a field of every kind."""

    layers: int = 2
    rate: float = 0.0
    tied: bool = False
    kind: Literal["dense", "moe"] = "dense"
    window: int | None = None
    note: str | None = None
    widths: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    inner: Inner = dataclasses.field(default_factory=lambda: Inner())

    def build(self) -> Any:
        return None


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1


def named_hook() -> None:
    """A hook that JSON can name."""


def make(**changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "name": "small",
        "model": Sizes(),
        "data": Stdlib(seq_len=8),
        "optimizer": AdamW(lr=1e-3),
        "schedule": Constant(),
        "steps": 10,
        "batch": 8,
    }
    return Recipe(**{**base, **changes})
