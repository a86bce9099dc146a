"""What is in a sample: documents with their places in the source, or the index of an image or of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.data.digits import Images, held_out
from portatrain.data.document_names import documents_at
from portatrain.data.left_out import LeftOut
from portatrain.data.mixture import Mixed
from portatrain.data.open import OpenData
from portatrain.data.own_arrays import Arrays
from portatrain.data.preferences import Pairs
from portatrain.data.spec import DataSpec, Digits, Mixture
from portatrain.data.split import Split
from portatrain.data.text_batches import Piece, TokenSplit

SHOWN = 8
"""Values of an array that are shown, at most; of a larger one its shape is."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a sample has of one document; of an image or of arrays, the whole sample.

    Attributes:
        source: the class of the source; of a mixture with its place in it.
        document: the number in the packed stream, the index in a source of arrays, or the number of a packed pair.
        file, index: the file of the document within its source and the index there; None if unknown.
        why: why they are unknown; "" if they are known, or if there are none.
        first: how many tokens of the document come before, without the one that opens it.
        tokens: its ids in the sample, without the one that opens it; None for arrays.
        column, count: its columns in the sample.
        values: the small arrays of the sample by key, such as a label.
    """

    source: str
    document: int
    file: str | None = None
    index: int = 0
    why: str = ""
    first: int = 0
    tokens: np.ndarray | None = None
    column: int = 0
    count: int = 0
    values: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The document in words."""
        if self.tokens is None:
            return f"sample {self.document} of {self.source}"
        if self.file is None:
            return f"document {self.document} of {self.source}"
        return self.file + (f", record {self.index}" if self.index else "")

    @property
    def key(self) -> tuple[str, int]:
        """What two parts of one document share."""
        return self.source, self.document


def parts_of(
    spec: DataSpec, data: OpenData, samples: Sequence[int], tell: Callable[[str], None] = lambda line: None
) -> dict[int, list[Part]]:
    """Return what is in these samples of the training split, by their numbers."""
    split = data.train.whole if isinstance(data.train, LeftOut) else data.train
    if isinstance(split, Mixed) and isinstance(spec, Mixture):
        out: dict[int, list[Part]] = {}
        source, number = split.locate(np.array(samples, np.int64))
        for s in np.unique(source).tolist():
            mine = {int(number[i]): samples[i] for i in np.flatnonzero(source == s).tolist()}
            kind = type(spec.sources[s]).__name__
            name = f"{spec.names[s]} ({kind}, source {s})" if spec.names else f"{kind} (source {s} of the mixture)"
            found = _of_tokens(spec.sources[s], name, split.parts[s], list(mine), tell)
            out |= {mine[n]: parts for n, parts in found.items()}
        return out
    name = type(spec).__name__
    if isinstance(split, TokenSplit):
        return _of_tokens(spec, name, split, samples, tell)
    return {n: [_of_arrays(spec, name, data, split, n)] for n in samples}


def _of_tokens(
    spec: DataSpec, name: str, split: TokenSplit, samples: Sequence[int], tell: Callable[[str], None]
) -> dict[int, list[Part]]:
    pieces = {n: split.pieces(n) for n in samples}
    known = documents_at(spec, split.stream, [p.token for each in pieces.values() for p in each], tell)

    def part(piece: Piece) -> Part:
        document = known[piece.token]
        opens = int(piece.token == document.start)
        return Part(
            source=name,
            document=document.number,
            file=document.file,
            index=document.index,
            why=document.why,
            first=piece.token + opens - document.start - 1,
            tokens=split.stream.read(piece.token + opens, piece.token + piece.count),
            column=piece.column,
            count=piece.count,
        )

    return {n: [part(piece) for piece in each] for n, each in pieces.items()}


def _of_arrays(spec: DataSpec, name: str, data: OpenData, split: Split, number: int) -> Part:
    if isinstance(split, Images) and isinstance(spec, Digits):
        held = 0 if data.validation is None else data.validation.windows
        index = int(np.flatnonzero(~held_out(split.windows + held, spec))[split.window_of(number)])
    else:
        assert isinstance(split, (Arrays, Pairs))
        index = split.index_of(number)
    row = {k: v[0] for k, v in split.batch(number, 1).items() if k not in ("sample", "mask")}
    values = {k: v.tolist() if v.size <= SHOWN else f"{v.dtype} {list(v.shape)}" for k, v in row.items()}
    return Part(source=name, document=index, values=values)
