"""Data: what a run reads, as frozen specs, and the fixed sequence of samples made of it.

The specs load nothing, so that recipes stay light; `open_data` and what else works on arrays is imported
when it is first asked for. May import NumPy and `portatrain.model.rng`; never a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from portatrain.data.spec import DataSpec, Digits, Jsonl, Mixture, Stdlib, TextFiles, TokenMemmap

if TYPE_CHECKING:
    from portatrain.data.ngram import KneserNey
    from portatrain.data.open import OpenData, open_data
    from portatrain.data.read_ahead import prefetch
    from portatrain.data.split import Split, batch_hash

_LAZY = {
    "KneserNey": "ngram",
    "OpenData": "open",
    "open_data": "open",
    "prefetch": "read_ahead",
    "Split": "split",
    "batch_hash": "split",
}

__all__ = [
    "DataSpec",
    "Digits",
    "Jsonl",
    "KneserNey",
    "Mixture",
    "OpenData",
    "Split",
    "Stdlib",
    "TextFiles",
    "TokenMemmap",
    "batch_hash",
    "open_data",
    "prefetch",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
