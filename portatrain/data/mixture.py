"""Mixtures of token sources in fixed proportions: blocks with an exact count per source, permuted within the block.

Sample n is at index ``n mod block`` of block ``n div block``. The permutation of the block maps the index to a rank.
The first ranks belong to the first source, as many as its count, the next ones to the second source, and so on. The
source's own sample number is the rank within its share plus its samples in earlier blocks, which is a sum over the
pieces of the schedule. Any n can therefore be located without state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from portatrain.data.mixture_fields import counts
from portatrain.data.spec import Mixture
from portatrain.data.split import Batch, Group, Split, samples
from portatrain.data.text_batches import TokenSplit
from portatrain.errors import UserError
from portatrain.model.rng import Permutation
from portatrain.system.text import counted


class Mixed(Split):
    """A mixture of token splits in the proportions of ``spec``. A batch has their arrays and ``source`` (B,) int32."""

    def __init__(self, spec: Mixture, parts: list[TokenSplit], *, name: str, seed: int) -> None:
        self.name, self._parts, self._seed, self._block, self._spec = name, parts, seed, spec.block, spec
        pieces = [(0, spec.weights), *spec.schedule]
        self._first = np.array([first for first, _ in pieces], np.int64)
        self._counts = np.array([counts(weights, spec.block) for _, weights in pieces], np.int64)  # (pieces, sources)
        # (pieces, sources): the number of samples of each source before the piece begins
        given = self._counts[:-1] * np.diff(self._first)[:, None]
        self._before = np.concatenate((np.zeros((1, len(parts)), np.int64), np.cumsum(given, axis=0)))
        self.windows = sum(p.windows for p in parts)
        rule = [spec.block, self._first.tolist(), self._counts.tolist(), [p.fingerprint for p in parts]]
        self.fingerprint = hashlib.sha256(json.dumps(["portatrain.mixture.1", *rule]).encode()).hexdigest()
        self.bytes_per_target = _bytes_per_target(parts)
        self.groups = _groups(spec, dict(enumerate(parts)))

    def batch(self, start: int, count: int) -> Batch:
        return self.part(start, count, np.ones(count, bool))

    def part(self, start: int, count: int, rows: np.ndarray) -> Batch:
        sample = samples(start, count)
        source, number = self.locate(sample)
        out = {k: np.repeat(v, count, axis=0) for k, v in self._parts[0].blank(1).items()}
        for s in np.unique(source[rows]).tolist():
            here = rows & (source == s)
            for key, value in self._parts[s].at(number[here]).items():
                out[key][here] = value
        return out | {"sample": sample, "source": source.astype(np.int32)}

    def blank(self, count: int) -> Batch:
        return self._parts[0].blank(count) | {"source": np.zeros(count, np.int32)}

    def ahead(self, start: int, count: int, rows: np.ndarray | None) -> None:
        sample = samples(start, count)
        source, number = self.locate(sample if rows is None else sample[rows])
        for s in np.unique(source).tolist():
            self._parts[s].ahead_at(number[source == s])

    @property
    def parts(self) -> Sequence[TokenSplit]:
        """The splits of the sources."""
        return self._parts

    def given(self, count: int) -> np.ndarray:
        """Return how many of the first `count` samples are of each source, (sources,) int64."""
        block, rest = divmod(count, self._block)
        piece = int(np.searchsorted(self._first, block, side="right")) - 1
        whole = self._before[piece] + (block - self._first[piece]) * self._counts[piece]
        source, _ = self.locate(block * self._block + np.arange(rest))
        return whole + np.bincount(source, minlength=len(self._parts))

    def check_end(self, end: int) -> None:
        if self._spec.exhausted == "repeat":
            return
        for name, source, wanted, part in zip(
            source_names(self._spec), self._spec.sources, self.given(end).tolist(), self._parts, strict=True
        ):
            if wanted > part.windows:
                raise UserError(
                    f"source {name} of the mixture ({type(source).__name__})",
                    expected=f"at most the {counted(part.windows, 'samples')} that it has, as exhausted='error' says",
                    got=f"a run that takes {wanted}: {wanted / part.windows:.2f} epochs",
                    do="Lower its weight, shorten the run, add data, or set exhausted='repeat'.",
                )

    def locate(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source and the source's own sample number, both (B,) int64, of samples (B,) int64."""
        block, place = np.divmod(sample, self._block)
        source, number = np.empty_like(sample), np.empty_like(sample)
        for b in np.unique(block).tolist():
            here = block == b
            piece = int(np.searchsorted(self._first, b, side="right")) - 1
            count = self._counts[piece]
            ends = np.cumsum(count)
            rank = Permutation(self._block, self._seed, f"data/mixture/{b}")(place[here])
            source[here] = mine = np.searchsorted(ends, rank, side="right")
            before = self._before[piece] + (b - self._first[piece]) * count
            number[here] = before[mine] + rank - (ends - count)[mine]
        return source, number


class Chained(Split):
    """The windows of several splits, interleaved. A mixture is evaluated on it.

    Every prefix has windows of each source in proportion to the windows that the source has, so an evaluation on the
    first batches reads all sources. ``held``: the splits by the numbers of their sources, in ascending order; a source
    of which nothing is held out has none. A batch has the same ``source`` as in training.
    """

    def __init__(self, spec: Mixture, held: Mapping[int, TokenSplit], *, name: str) -> None:
        parts = list(held.values())
        self.name, self._held = name, held
        # Window i of n of a source stands at (i + 1/2) / n of the whole; of equals, the earlier source is first.
        place = np.concatenate([(np.arange(p.windows) + 0.5) / p.windows for p in parts])
        order = np.argsort(place, kind="stable")
        self.windows = len(order)
        self._source = np.repeat(np.array(list(held), np.int32), [p.windows for p in parts])[order]
        self._number = np.concatenate([np.arange(p.windows) for p in parts])[order]
        text = json.dumps(["portatrain.chained.2", [p.fingerprint for p in parts]])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.bytes_per_target = _bytes_per_target(parts)
        self.groups = _groups(spec, held)

    def batch(self, start: int, count: int) -> Batch:
        sample = samples(start, count)
        window = sample % self.windows
        source, number = self._source[window], self._number[window]
        out = {k: np.repeat(v, count, axis=0) for k, v in self._blank(1).items()}
        for s in np.unique(source).tolist():
            here = source == s
            for key, value in self._held[s].at(number[here]).items():
                out[key][here] = value
        return out | {"sample": sample, "source": source.astype(np.int32)}

    def blank(self, count: int) -> Batch:
        return self._blank(count) | {"source": np.zeros(count, np.int32)}

    def _blank(self, count: int) -> Batch:
        return next(iter(self._held.values())).blank(count)


def source_names(spec: Mixture) -> tuple[str, ...]:
    """Return the name of each source, in order."""
    return spec.names or tuple(f"source-{number}" for number in range(len(spec.sources)))


def _groups(spec: Mixture, parts: Mapping[int, TokenSplit]) -> tuple[Group, ...]:
    """Return the sources `parts`, by number, in groups of one name, in the order of their first source."""
    numbers: dict[str, list[int]] = {}
    for number in parts:
        numbers.setdefault(source_names(spec)[number], []).append(number)
    return tuple(
        Group(name=name, sources=tuple(mine), bytes_per_target=_bytes_per_target([parts[n] for n in mine]))
        for name, mine in numbers.items()
    )


def _bytes_per_target(parts: list[TokenSplit]) -> float | None:
    known = [(p.stream.bytes, p.stream.size - p.stream.documents) for p in parts]
    if any(b is None for b, _ in known):
        return None
    return sum(b for b, _ in known if b is not None) / sum(t for _, t in known)
