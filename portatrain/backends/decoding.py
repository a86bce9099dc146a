"""Decode with a cache of keys and values, without a change of the model.

The operations that a backend hands to `model.predict` are those of training, with `CachedAttention` before them:
`attention` writes its new keys and values into the cache of its call site, and attends over the cache. Call sites are
told apart by the order of the calls, and those of a Stack by its layers too. Everything else in a model must act on one
position at a time: `ProbedOps` finds what does not, and `portatrain/training/left_to_right.py` judges it.

Rows end at the same index, so shorter ones begin later: row b begins at `offset_B[b]`. What is before is blank: it has
segment 0 and position 0, and no token attends to it.

Shape letters: B rows, S new tokens, T length of the cache, K kv_heads, D head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from portatrain.errors import UserError

ALONG = ("cumsum", "sort", "argsort", "scan", "associative_scan")
"""Operations that act along one axis, of which the values may hide it."""


class CachedModel(Protocol):
    """A model with its weights on one device, as `Backend.cached(state)` returns it. Batches are NumPy."""

    def begin(self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, length: int) -> tuple[np.ndarray, Any]:
        """Run the model on prompts, (B, S); return the logits of the last position, (B, V) float32, and a cache of
        `length` positions that holds them."""
        ...

    def extend(
        self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, cache: Any, at: int
    ) -> tuple[np.ndarray, Any]:
        """Run the model on one more token a row, (B, 1), at index `at` of the cache; return as `begin` does. It
        consumes the cache that it is given."""
        ...

    def probe(self, batch: Mapping[str, np.ndarray], poison_BS: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the predictions, float32, of the model with an attention in which every position sees itself alone,
        and sentences about calls that a cache cannot serve. `poison_BS` is added to all that is looked up by an id."""
        ...


@dataclass
class Placed:
    """Where the tokens of a call lie, as arrays of the framework: the segment and the position of every new token and
    of every place of the cache. Blank places have segment 0."""

    length: int
    segments_BS: Any
    positions_BS: Any = None
    segments_BT: Any = None
    positions_BT: Any = None
    at: Any = None
    """() integer: the index of the first new token; None in the first call."""

    @classmethod
    def of(cls, ops: Any, offset_B: Any, new: int, length: int, at: Any = None) -> Placed:
        """Place `new` tokens a row from index `at` on."""

        def segments(positions: Any) -> Any:
            return ops.cast(positions >= 0, "int32")

        positions_BS = ops.arange(new)[None, :] - offset_B[:, None] + (0 if at is None else at)
        if at is None:
            return cls(length, segments(positions_BS))
        positions_BT = ops.arange(length)[None, :] - offset_B[:, None]
        return cls(length, segments(positions_BS), positions_BS, segments(positions_BT), positions_BT, at)


@dataclass
class Decoding:
    """The cache of the call sites of a model or of one layer. `held` is what the last call left, `made` what this one
    leaves; both are (keys, values) by call site, or those of a Stack."""

    placed: Placed
    held: list[Any] | None = None
    made: list[Any] = field(default_factory=list)

    def take(self) -> Any:
        """Return what the last call left at this call site; None in the first call."""
        return None if self.held is None else self.held[len(self.made)]

    def inside(self, held: Any) -> Decoding:
        """Return the cache of one layer of a Stack."""
        return Decoding(self.placed, held)


class CachedAttention:
    """A mixin before a backend's operations, see the top of this file."""

    decoding: Decoding | None

    def attention(self: Any, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        decoding, run = self.decoding, super().attention  # type: ignore[misc]
        placed, held = decoding.placed, decoding.take()
        options.pop("positions", None)  # those of the batch: the probe has seen to it
        if placed.at is None:
            more = placed.length - k_BTKD.shape[1]
            decoding.made.append(tuple(self.pad(x, axis=1, after=more) for x in (k_BTKD, v_BTKD)))
            return run(q_BSHD, k_BTKD, v_BTKD, **options | {"segment_ids": placed.segments_BS})
        k_BTKD, v_BTKD = (self.into_cache(old, x, placed.at) for old, x in zip(held, (k_BTKD, v_BTKD), strict=True))
        decoding.made.append((k_BTKD, v_BTKD))
        seen = {
            "segment_ids": (placed.segments_BS, placed.segments_BT),
            "positions": (placed.positions_BS, placed.positions_BT),
        }
        return run(q_BSHD, k_BTKD, v_BTKD, **options | seen)

    def into_cache(self: Any, cache_BTKD: Any, x_BSKD: Any, at: Any) -> Any:
        """Return the cache with new keys or values at index `at`."""
        return self.write(cache_BTKD, x_BSKD, at)


@dataclass
class Probe:
    """What a probe adds, and the sentences that it collects."""

    poison_BS: Any
    found: list[str] = field(default_factory=list)

    def tell(self, sentence: str) -> None:
        if sentence not in self.found:
            self.found.append(sentence)


class ProbedOps:
    """A mixin before a backend's operations: no position sees another one, unless the model itself mixes them."""

    probe: Probe | None
    given: Mapping[str, Any]

    def attention(self: Any, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        for sentence in _refusals(self.given, q_BSHD, k_BTKD, options):
            self.probe.tell(sentence)
        groups = q_BSHD.shape[2] // k_BTKD.shape[2]
        if k_BTKD.shape[1] != q_BSHD.shape[1]:  # of no use here, but of the right shape
            k_BTKD, v_BTKD = (x[:, :1] + 0 * q_BSHD[:, :, :1, :1] for x in (k_BTKD, v_BTKD))
        shape = (-1, *k_BTKD.shape[1:3], groups)
        q_BSKGD = q_BSHD.reshape(*shape, q_BSHD.shape[3])
        gate_BSKG = self.sigmoid((q_BSKGD * k_BTKD[:, :, :, None]).sum(-1))
        out = gate_BSKG[..., None] * v_BTKD[:, :, :, None]
        return out.reshape(-1, q_BSHD.shape[1], q_BSHD.shape[2], v_BTKD.shape[3])

    def embed(self: Any, table_VE: Any, ids: Any) -> Any:
        return self._poisoned(super().embed(table_VE, ids), ids)  # type: ignore[misc]

    def one_hot(self: Any, ids: Any, n: int) -> Any:
        return self._poisoned(super().one_hot(ids, n), ids)  # type: ignore[misc]

    def _poisoned(self: Any, x: Any, ids: Any) -> Any:
        poison_BS = self.probe.poison_BS
        if tuple(ids.shape[:2]) != tuple(poison_BS.shape):
            return x
        return x + self.cast(poison_BS, "compute").reshape(-1, poison_BS.shape[1], *(1,) * (x.ndim - 2))


def _along(name: str) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        xs = args[2] if name == "scan" else args[1] if name == "associative_scan" else args[0]
        first = next(iter(_leaves(xs)))
        axis = options.get("axis", 1 if "scan" in name else -1)
        if axis in (1, 1 - first.ndim) and tuple(first.shape[:2]) == tuple(self.probe.poison_BS.shape):
            self.probe.tell(f"ops.{name} runs along the positions")
        return getattr(super(ProbedOps, self), name)(*args, **options)

    call.__name__ = name
    return call


for _name in ALONG:
    setattr(ProbedOps, _name, _along(_name))


def _leaves(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, (list, tuple)):
        yield tree
        return
    for item in tree:
        yield from _leaves(item)


def _refusals(given: Mapping[str, Any], q: Any, k: Any, options: Mapping[str, Any]) -> list[str]:
    """Return why a cache cannot serve a call of `Ops.attention`; `given` is the batch."""
    found = []
    if not options.get("causal", True):
        found.append("attention is not causal")
    if options.get("prefix") is not None:
        found.append("attention has a prefix")
    if q.shape[1] != k.shape[1]:
        found.append("attention has keys of other positions than its queries")
    for name in ("segment_ids", "positions"):
        value = options.get(name)
        each = value if isinstance(value, tuple) else (value,)
        if any(one is not given.get(name) for one in each if one is not None):
            found.append(f"the {name} of attention are not those of the batch")
    return found


def last_logits(predicted: Any, rows: int, new: int, model: object) -> Any:
    """Return the predictions of the last position, (B, V). Raises UserError if `predicted` is not (B, S, V)."""
    shape = tuple(getattr(predicted, "shape", ()))
    if len(shape) != 3 or shape[:2] != (rows, new):
        raise UserError(
            f"{type(model).__name__}.predict",
            expected=f"logits of every position, of shape ({rows}, {new}, vocabulary)",
            got=f"shape {shape}" if shape else f"a {type(predicted).__name__}",
            do="Return (B, S, V) from predict(ops, batch); only such a model continues texts.",
        )
    return predicted[:, -1]
