"""Name the documents of a packed stream: the file of the source and the index in it.

A pack keeps no names. The order of its documents follows from the source (`corpus.py`, `store/packing.py`), so the
source, if it is still there, gives the name of the k-th document back. Documents without content are not packed, so
if there are some, those before are read. What is found is compared with the tokens of the pack: a source that has
been changed since gives no name instead of a wrong one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

import portatrain.data as public
from portatrain.data.corpus import Stream, open_source
from portatrain.data.documents import Documents, Spooled
from portatrain.data.spec import DataSpec, PackedTokens
from portatrain.data.store import packing
from portatrain.data.store.layout import Manifest
from portatrain.data.store.places import place, required
from portatrain.data.store.reading import PackedStream
from portatrain.errors import UserError
from portatrain.model.rng import Permutation

Tell = Callable[[str], None]
SPLIT = "train"
SCAN = 1 << 20
EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Named:
    """A document of a stream: its number there, its first token, its name (None: unknown, for the reason `why`)."""

    number: int
    start: int
    file: str | None = None
    index: int = 0
    why: str = ""


def documents_at(
    spec: DataSpec, stream: Stream | PackedStream, tokens: Sequence[int], tell: Tell = lambda line: None
) -> dict[int, Named]:
    """Return the documents of a stream's training split that have these tokens, by token."""
    places = _placed(stream, sorted(set(tokens)), tell)
    wanted = {number: start for number, start in places.values()}
    found, why = {}, ""
    try:
        found = _names(spec, stream, wanted, tell)
    except (UserError, OSError) as error:
        told = f"{error.expected}, got {error.got}" if isinstance(error, UserError) else str(error)
        why = f"its source cannot be read here: expected {told}" if isinstance(error, UserError) else told
    out = {}
    for token, (number, start) in places.items():
        name = found.get(number)
        if name is not None:
            out[token] = Named(number=number, start=start, file=name[0], index=name[1])
        else:
            changed = "its source has been changed since it was packed"
            out[token] = Named(number=number, start=start, why=why or changed)
    return out


def _placed(stream: Stream | PackedStream, tokens: Sequence[int], tell: Tell) -> dict[int, tuple[int, int]]:
    """Return (number of the document, its first token) of every token."""
    if isinstance(stream, Stream):
        at = np.searchsorted(stream.starts, np.array(tokens, np.int64), side="right") - 1
        return {token: (int(n), int(stream.starts[n])) for token, n in zip(tokens, at, strict=True)}
    out: dict[int, tuple[int, int]] = {}
    left, before, last, told = list(tokens), 0, 0, _Told(tell)
    for low in range(0, (tokens[-1] if tokens else -1) + 1, SCAN):
        told.at(f"counting the documents of the store: {low:,} of {tokens[-1]:,} tokens")
        _, opens_1S, _ = stream.rows(np.array([low]), min(SCAN, stream.size - low))
        starts = low + np.flatnonzero(opens_1S[0])
        while left and left[0] < low + SCAN:
            token = left.pop(0)
            n = int(np.searchsorted(starts, token, side="right"))
            out[token] = before + n - 1, int(starts[n - 1]) if n else last
        before, last = before + len(starts), int(starts[-1]) if len(starts) else last
    return out


def _names(
    spec: DataSpec, stream: Stream | PackedStream, wanted: dict[int, int], tell: Tell
) -> dict[int, tuple[str, int]]:
    """Return the (file, index) of the documents `wanted`, number -> first token, as far as the source has them."""
    groups = 1
    if isinstance(spec, PackedTokens):
        made = required(place(spec.path))
        spec, groups = _spec_of(made), made.splits[SPLIT].groups
    source = open_source(spec)
    with closing(source):
        mine = np.flatnonzero(~source.held_out(getattr(spec, "validation", 0.0)))
        if groups > 1:
            numbers = _grouped(source, mine, stream, wanted, tell)
        else:
            with closing(Spooled(source) if source.in_order else source) as ready:
                numbers = _permuted(ready, mine, stream, wanted, tell)
                return _checked(ready, stream, wanted, numbers)
        return _checked(source, stream, wanted, numbers)


def _permuted(
    source: Documents, mine: np.ndarray, stream: Stream | PackedStream, wanted: dict[int, int], tell: Tell
) -> dict[int, int]:
    """Return number in the stream -> number in the source, if all documents were permuted together."""
    order = mine[Permutation(len(mine), 0, f"data/documents/{SPLIT}")(np.arange(len(mine)))]
    if len(order) == stream.documents:  # none is without content
        return {number: int(order[number]) for number in wanted}
    return dict(_counted(source, order, wanted, tell))


def _counted(
    source: Documents, order: np.ndarray, wanted: dict[int, int], tell: Tell, number: int = 0
) -> Iterator[tuple[int, int]]:
    """Yield (number in the stream, number in the source) of those `wanted`; documents without content do not count.
    The first one with content has the number `number`."""
    told, last = _Told(tell), max(wanted, default=-1)
    for at, document in enumerate(order.tolist()):
        if number > last:
            return
        told.at(f"reading the source: document {at:,} of {len(order):,}")
        if len(source.read_masked(document)[0]):
            if number in wanted:
                yield number, document
            number += 1


def _grouped(
    source: Documents, mine: np.ndarray, stream: Stream | PackedStream, wanted: dict[int, int], tell: Tell
) -> dict[int, int]:
    """Return what `_permuted` does, for a store whose documents were permuted in groups."""
    found: dict[int, int] = {}
    later, told, last = source.defer(), _Told(tell), max(wanted, default=-1)
    first = number = group = 0
    full: list[bool] = []
    read = before = 0
    for at, document in enumerate(mine.tolist()):
        if number > last:
            break
        told.at(f"reading the source: document {at:,} of {len(mine):,}")
        if source.in_order:
            for other in range(before, document):
                source.read_masked(other)
        before = document + 1
        data = source.read_masked(document)[0]
        read += data.nbytes
        full.append(bool(len(later.real(data.tobytes(), later.where)) if later is not None else len(data)))
        if at + 1 == len(mine) or len(full) >= packing.GROUP_DOCUMENTS or read >= packing.GROUP_BYTES:
            key = f"data/documents/{SPLIT}" + (f"/{group}" if group else "")
            for place_in in Permutation(len(full), 0, key)(np.arange(len(full))).tolist():
                if full[place_in]:
                    if number in wanted:
                        found[number] = int(mine[first + place_in])
                    number += 1
            first, group, full, read = at + 1, group + 1, [], 0
    if later is not None:
        source._encode = later.real
    return found


def _checked(
    source: Documents, stream: Stream | PackedStream, wanted: dict[int, int], numbers: dict[int, int]
) -> dict[int, tuple[str, int]]:
    """Return the names of the documents whose tokens in the source are those of the stream."""
    out = {}
    for number, document in sorted(numbers.items(), key=lambda one: one[1]):
        tokens, start = source.read_masked(document)[0], wanted[number]
        if len(tokens) and np.array_equal(tokens, stream.read(start + 1, start + 1 + len(tokens))):
            out[number] = source.files[int(source.file[document])][0], int(source.index[document])
    return out


def _spec_of(made: Manifest) -> DataSpec:
    """Return the spec that a store was packed from."""
    facts = {k: tuple(v) if isinstance(v, list) else v for k, v in made.made_from.items()}
    kind = getattr(public, str(facts.pop("source", "")), None)
    facts.pop("tokenizer_sha256", None)
    if not (isinstance(kind, type) and issubclass(kind, DataSpec)):
        raise UserError(
            "the source of the packed store",
            expected="a source of portatrain's own, which can be opened again",
            got=repr(made.made_from.get("source")),
            do="Its documents have numbers, and no names.",
        )
    spec: DataSpec = kind(**facts, seq_len=1)  # type: ignore[call-arg]
    return spec


class _Told:
    """Says now and then how far a long reading is."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._told_s = tell, time.monotonic()

    def at(self, line: str) -> None:
        if (now_s := time.monotonic()) >= self._told_s + EVERY_S:
            self._told_s = now_s
            self._tell(line)
