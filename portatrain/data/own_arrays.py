"""The splits of an `ArraySource`: samples by index, stacked into batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from portatrain.data.own import ArraySource
from portatrain.data.split import Batch, Order, Split, samples
from portatrain.errors import UserError
from portatrain.errors.users_code import explained
from portatrain.model import rng

_NARROW = {"float64": np.float32, "int64": np.int32, "uint64": np.int32}
Sample = dict[str, np.ndarray]


class Arrays(Split):
    """The samples ``indices`` of a source, read by ``get(index)``; see `ArraySource` for the arrays of a batch."""

    def __init__(
        self,
        what: str,
        get: Callable[[int], Mapping[str, Any]],
        indices: np.ndarray,
        *,
        name: str,
        seed: int,
        facts: list[Any],
    ) -> None:
        self.name, self.windows = name, len(indices)
        self._what, self._get, self._indices = what, get, indices
        self._like = read(what, get, int(indices[0]))
        self._again(int(indices[0]))
        like = {key: [value.dtype.str, list(value.shape)] for key, value in sorted(self._like.items())}
        digest = hashlib.sha256(json.dumps(["portatrain.arrays.1", name, facts, like]).encode())
        digest.update(np.ascontiguousarray(indices, "<i8").data)
        self.fingerprint = digest.hexdigest()
        self._order = Order(self.windows, seed, f"data/{name}", permuted=name == "train")

    def batch(self, start: int, count: int) -> Batch:
        sample = samples(start, count)
        out = self.blank(count)
        for row, index in enumerate(self._indices[self._order(sample)].tolist()):
            found = read(self._what, self._get, index)
            self._same(index, found)
            for key, value in found.items():
                out[key][row] = value
        if "mask" not in self._like:
            out["mask"][:] = 1
        return out | {"sample": sample}

    def index_of(self, sample: int) -> int:
        """Return the index, in the source, of the sample of that number."""
        return int(self._indices[self._order(np.array([sample]))[0]])

    def blank(self, count: int) -> Batch:
        return blank(self._like, count)

    def _again(self, index: int) -> None:
        """Raise UserError if a second call gives another sample: a run that goes on would train on other data."""
        found = read(self._what, self._get, index)
        self._same(index, found)
        for key, value in self._like.items():
            if not np.array_equal(value, found[key], equal_nan=value.dtype.kind == "f"):
                raise UserError(
                    f"{self._what}({index}), key {key!r}",
                    expected="the same values at every call",
                    got="others at the second call",
                    do="Draw from np.random.default_rng(index), and keep no state between calls.",
                )

    def _same(self, index: int, found: Sample) -> None:
        """Raise UserError unless a sample has the keys, shapes and dtypes of the first one."""
        for key in sorted(self._like.keys() | found.keys()):
            first, now = self._like.get(key), found.get(key)
            if first is None or now is None or (first.shape, first.dtype) != (now.shape, now.dtype):
                raise UserError(
                    f"{self._what}({index}), key {key!r}",
                    expected=f"what the first sample has: {_in_words(first)}",
                    got=_in_words(now),
                    do="Give all samples the same keys, shapes and dtypes; pad or crop where they differ.",
                )


def _in_words(array: np.ndarray | None) -> str:
    return "no such key" if array is None else f"{array.dtype.name} of shape {array.shape}"


def blank(like: Sample, count: int) -> Batch:
    """Return ``count`` padding rows for samples such as ``like``, as `Split.blank` does."""
    rows = {key: np.zeros((count, *value.shape), value.dtype) for key, value in like.items()}
    return {"mask": np.zeros(count, np.float32), **rows, "sample": np.full(count, -1, np.int64)}


def read(what: str, get: Callable[[int], Mapping[str, Any]], index: int) -> Sample:
    """Return one sample as arrays of numbers of at most 32 bits. Raises UserError for what is not such a sample."""
    try:
        found = get(index)
        if not isinstance(found, Mapping):
            raise UserError(
                f"{what}({index})",
                expected="a dictionary of numbers and arrays",
                got=type(found).__name__,
                do='Return {"x": ..., "y": ...}.',
            )
        arrays = {key: np.asarray(value) for key, value in found.items()}
    except Exception as error:
        if mistake := explained(error, f"{what}({index})"):
            raise mistake from error
        raise
    for key, value in arrays.items():
        if not isinstance(key, str) or key == "sample" or value.dtype.kind not in "fiub":
            raise UserError(
                f"{what}({index}), key {key!r}",
                expected="an array of numbers under a text that is not 'sample'",
                got=f"{value.dtype} under {key!r}",
                do="Convert it to numbers, or leave it out.",
            )
        if value.dtype.name in _NARROW:
            narrow = _NARROW[value.dtype.name]
            if value.dtype.kind != "f" and value.size and not -(2**31) <= int(value.min()) <= int(value.max()) < 2**31:
                raise UserError(
                    f"{what}({index}), key {key!r}",
                    expected="integers that fit into 32 bits",
                    got=f"some from {int(value.min())} to {int(value.max())}",
                    do="Use smaller numbers: a batch has no 64-bit integers.",
                )
            arrays[key] = value.astype(narrow)
    return arrays


def example(spec: ArraySource) -> Sample:
    """Return the first sample of a source, for its keys, shapes and dtypes."""
    return read(f"{type(spec).__name__}.sample", spec.sample, 0)


def open_arrays(spec: ArraySource, seed: int) -> dict[str, Split]:
    """Return the splits of a source, by name. Raises UserError if a split would have no samples."""
    kind = type(spec).__name__
    if not isinstance(spec.version, str) or not spec.version:
        raise UserError(
            f"{kind}.version",
            expected="a text that changes when the samples change",
            got=repr(spec.version),
            do="Set it to '1', say.",
        )
    fields = dataclasses.asdict(spec)  # type: ignore[call-overload]
    facts = [kind, spec.version, json.loads(json.dumps(fields, sort_keys=True, default=repr))]
    counted = _length(kind, "__len__", lambda: len(spec))
    if hasattr(spec, "validation_sample"):
        held = _length(kind, "validation_len", lambda: spec.validation_len())  # type: ignore[attr-defined]
        parts = {"train": ("sample", np.arange(counted)), "validation": ("validation_sample", np.arange(held))}
    else:
        fraction = float(getattr(spec, "validation", 0.0))
        drawn = rng.words(0, f"data/split/{kind}", 0, counted) >> np.uint64(11)
        out = drawn.astype(np.float64) * 2.0**-53 < fraction
        parts = {"train": ("sample", np.flatnonzero(~out))}
        if fraction:
            parts["validation"] = ("sample", np.flatnonzero(out))
    for name, (_, indices) in parts.items():
        if not len(indices):
            raise UserError(
                f"{kind} data",
                expected=f"at least one sample in the {name} split",
                got="none",
                do="Add samples, or change what is held out (validation).",
            )
    return {
        name: Arrays(f"{kind}.{method}", getattr(spec, method), indices, name=name, seed=seed, facts=facts)
        for name, (method, indices) in parts.items()
    }


def _length(kind: str, method: str, count: Callable[[], int]) -> int:
    try:
        return int(count())
    except Exception as error:
        if mistake := explained(error, f"{kind}.{method}()"):
            raise mistake from error
        raise
