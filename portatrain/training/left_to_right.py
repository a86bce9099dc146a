"""Find out whether a model can continue a text with a cache of keys and values, by running it on a few tokens.

A cache holds what attention remembers of earlier positions, and nothing else does. So everything in the model but
attention must act on one position at a time, and know of a position what the batch says of it and not its index in an
array. The probe runs the model with an attention in which every position sees itself alone, and looks whether
something still travels from one position to another: a changed token, and a NaN, which no weight of zero stops.

Shape letters: B rows, S positions, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from portatrain.backends.base import Backend
from portatrain.backends.decoding import CachedModel
from portatrain.errors import UserError
from portatrain.model.module import Definition

Batch = dict[str, np.ndarray]
BATCH = ("tokens", "segment_ids", "positions")
"""The arrays of a batch, (B, S), from which a model continues texts."""
ROWS = 2
SHORTEST = 11
"""Positions of the probe, or the next number that is no size of the model, so that sizes tell positions apart."""
CHANGE = {"fp32": 2.0**-10}
"""The change of a prediction, as a fraction of the largest one, that is more than rounding: products of matrices of
other contents round in another order. In bfloat16 2^-4."""


def batch_of(tokens_BS: np.ndarray, begins_B: np.ndarray | None = None, ends_B: np.ndarray | None = None) -> Batch:
    """Return a batch of texts that begin and end at these columns, by default the first and the last one. What is
    outside is blank, of segment 0."""
    rows, size = tokens_BS.shape
    columns = np.arange(size, dtype=np.int32)[None, :]
    at = columns - (np.zeros(rows, np.int32) if begins_B is None else begins_B.astype(np.int32))[:, None]
    inside = (at >= 0) & (columns < (np.full(rows, size) if ends_B is None else ends_B)[:, None])
    return {
        "tokens": np.where(inside, tokens_BS, 0).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "positions": np.where(inside, at, 0).astype(np.int32),
    }


def why_no_cache(cached: CachedModel, definition: Definition, precision: str) -> str:
    """Return why a cache cannot serve a model: '' if it can."""
    size = SHORTEST
    while any(size in t.shape for t in definition.tensors.values()):
        size += 1
    tokens_BS = _tokens(definition, size)
    changed_B = np.array([2, size // 2 + 1])
    none_BS = np.zeros((ROWS, size), np.float32)
    try:
        before, found = cached.probe(batch_of(tokens_BS), none_BS)
        if before.ndim != 3 or before.shape[:2] != tokens_BS.shape:
            return ""  # `last_logits` explains it
        if found:
            return found[0]
        after, _ = cached.probe(batch_of(_other(definition, tokens_BS, changed_B)), none_BS)
        poison_BS = none_BS.copy()
        poison_BS[np.arange(ROWS), changed_B] = np.nan
        poisoned, _ = cached.probe(batch_of(tokens_BS), poison_BS)
        same = batch_of(np.full_like(tokens_BS, tokens_BS[0, 0]))
        same["positions"][:] = 3
        alike, _ = cached.probe(same, none_BS)
    except (UserError, KeyError):  # a KeyError names what the batch has not
        raise
    except Exception as error:  # a framework's, for a model of one length: it can be run on that length alone
        return f"the model cannot be run on {size} tokens ({type(error).__name__})"
    if not np.isfinite(before).all():
        return ""  # the first draw explains it
    others_BS = np.arange(size)[None, :] != changed_B[:, None]
    limit = CHANGE.get(precision, 2.0**-4) * np.abs(before).max()
    moved = np.abs(after - before)[others_BS]
    if np.isnan(poisoned[others_BS]).any() or moved.max() > limit:
        return "something in the model but attention mixes positions"
    if np.abs(alike - alike[:, :1]).max() > limit:
        return "the model takes positions from the index of a token and not from batch['positions']"
    return ""


def check_causal(predict: Callable[[Mapping[str, np.ndarray]], np.ndarray], backend: Backend, size: int) -> None:
    """Raise UserError if a prediction changes with a later token. `size`: the number of positions to try it on."""
    definition = backend.program.definition
    tokens_BS = _tokens(definition, size)
    changed_B = np.array([size // 2, size - 1])
    before, after = (predict(batch_of(t)) for t in (tokens_BS, _other(definition, tokens_BS, changed_B)))
    if before.ndim != 3 or before.shape[:2] != tokens_BS.shape or not np.isfinite(before).all():
        return
    earlier_BS = np.arange(size)[None, :] < changed_B[:, None]
    limit = CHANGE.get(backend.program.precision, 2.0**-4) * np.abs(before).max()
    if earlier_BS.any() and np.abs(after - before)[earlier_BS].max() > limit:
        raise UserError(
            f"model {type(definition.model).__name__}",
            expected="a model in which a prediction depends on the tokens up to its own position alone",
            got="one whose predictions change with a later token",
            do="Use predict(batch): only a model that reads from left to right continues a text.",
        )


def _vocab(definition: Definition) -> int:
    return min((t.shape[t.axes.index("vocab")] for t in definition.params.values() if "vocab" in t.axes), default=2)


def _tokens(definition: Definition, size: int) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, _vocab(definition), (ROWS, size))
    return drawn.astype(np.int32)


def _other(definition: Definition, tokens_BS: np.ndarray, at_B: np.ndarray) -> np.ndarray:
    """Return the tokens with another one in every row."""
    tokens_BS, rows = tokens_BS.copy(), np.arange(len(tokens_BS))
    tokens_BS[rows, at_B] = (tokens_BS[rows, at_B] + 1) % _vocab(definition)
    return tokens_BS
