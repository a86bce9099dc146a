"""Data: specs of sources, and the sequence of samples that they define as a function of (spec, seed) alone.

A batch is made in `text_batches.py` (text), `digits.py` (images), `own_arrays.py` (arrays of your own),
`preferences.py` (pairs of chats) or `mixture.py` (several sources). `open.py` puts them together from a spec, and
`read_ahead.py` makes the next batches in a thread.

Specs are frozen dataclasses that load nothing, so recipes import fast; names that need NumPy, such as `open_data`, are
imported at their first use. This room imports NumPy and `portatrain.model.rng`, and no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from portatrain.data.spec import (
    ArrayRecords,
    Arrow,
    DataSpec,
    Digits,
    Jsonl,
    Megatron,
    Mixture,
    PackedTokens,
    Parquet,
    Preferences,
    Stdlib,
    TextFiles,
    TokenMemmap,
)

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
    "ArrayRecords",
    "Arrow",
    "DataSpec",
    "Digits",
    "Jsonl",
    "KneserNey",
    "Megatron",
    "Mixture",
    "OpenData",
    "PackedTokens",
    "Parquet",
    "Preferences",
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
