"""Packed token streams: the documents of a source, one after another, in one stream per split."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.config import left_out
from portatrain.data import pack as packs
from portatrain.data import pack_cache
from portatrain.data.documents import Documents, Spooled, check_ids_of
from portatrain.data.own import gives_documents
from portatrain.data.own_documents import OwnDocuments
from portatrain.data.sources import documents
from portatrain.data.spec import DataSpec
from portatrain.errors import UserError
from portatrain.model.rng import Permutation
from portatrain.system.text import counted

SPLITS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Documents one after another; each begins with the token ``bos``.

    ``tokens``: (n,) unsigned integers. ``starts``: (documents,) int64, the index of the first token of each document,
    increasing from 0. ``bytes``: the number of source bytes that the tokens represent, or None if unknown.
    """

    tokens: np.ndarray
    starts: np.ndarray
    vocab: int
    bos: int
    bytes: int | None
    fingerprint: str
    passed_over: tuple[str, ...] = ()
    """Sentences about what the source holds and was not packed; the same for its splits."""
    targets: np.ndarray | None = None
    """(n,) uint8, 1 for each token that is a target. None: all are, except those that begin a document."""
    target_blocks: packs.Blocks | None = None
    """What reads of ``targets`` are held to, as for the tokens."""
    blocks: packs.Blocks | None = None
    """What reads of the tokens are held to, if the pack was too large to be verified at once."""
    verification: packs.Verification | None = None
    """The check of the whole pack in the background; the same for its splits."""
    scattered = False
    """Its documents are permuted all over, so its windows need not be."""

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.starts)

    def rows(self, begin: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens [b, b + size) for each of ``begin``, (B,), as (B, size) int32, zeros after the end; and (B,
        size) bool twice: True where a document begins, and False where a token is no target. Raises UserError if the
        tokens are damaged."""
        tokens = np.zeros((len(begin), size), np.int32)
        counted = np.ones((len(begin), size), bool)
        for i, at in enumerate(begin.tolist()):
            part = self.read(at, at + size)
            tokens[i, : len(part)] = part
            if (targets := self.are_targets(at, at + size)) is not None:
                counted[i, : len(targets)] = targets
        low = np.searchsorted(self.starts, begin)
        count = np.searchsorted(self.starts, begin + size) - low
        row = np.repeat(np.arange(len(begin)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        opens = np.zeros((len(begin), size), bool)
        opens[row, self.starts[low[row] + nth] - begin[row]] = True
        return tokens, opens, counted

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return tokens [first, stop), as many as there are. Raises UserError if they are damaged."""
        if self.blocks is not None:
            self.blocks.check(first, min(stop, len(self.tokens)))
        return self.tokens[first:stop]

    def are_targets(self, first: int, stop: int) -> np.ndarray | None:
        """Return which of the tokens [first, stop) are targets, or None if all are that do not begin a document."""
        if self.targets is None:
            return None
        if self.target_blocks is not None:
            self.target_blocks.check(first, min(stop, len(self.targets)))
        return self.targets[first:stop]

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document, without its ``bos``."""
        end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.tokens)
        return self.read(int(self.starts[number]) + 1, int(end))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.document(i) for i in range(len(self.starts)))


HOW = ("seq_len", "packing")
"""The fields that say how samples are cut out of the packed corpus, and change nothing in it."""


def identity(spec: DataSpec) -> dict[str, Any]:
    """Return the facts that determine the packed corpus of ``spec``. How samples are cut is not one of them."""
    kept = [f.name for f in dataclasses.fields(spec) if f.name not in HOW and not left_out(spec, f.name)]
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k in kept}
    return json.loads(json.dumps({"source": type(spec).__name__, **fields}))


def streams(spec: DataSpec, pack_dir: Path | None) -> dict[str, Stream]:
    """Return the packed streams of a token source, by split; no ``validation`` if no document is held out."""
    return streams_in(*_pack(spec, pack_dir))


def streams_in(pack: packs.Pack, why: str | None = None) -> dict[str, Stream]:
    """Return the streams of a pack, by split. why: what its reader should know of how it was packed."""
    meaning = pack.facts["meaning"]
    out = {}
    for split in SPLITS:
        tokens, starts = pack.arrays[f"{split}-tokens"], pack.arrays[f"{split}-starts"]
        if len(starts):
            out[split] = Stream(
                tokens=tokens,
                starts=starts,
                vocab=meaning["vocab"],
                bos=meaning["bos"],
                bytes=pack.facts[f"{split}_bytes"],
                fingerprint=pack.fingerprints[split],
                passed_over=(*pack.facts.get("passed_over", ()), *([why] if why else [])),
                targets=pack.arrays.get(f"{split}-targets"),
                target_blocks=pack.blocks.get(f"{split}-targets"),
                blocks=pack.blocks.get(f"{split}-tokens"),
                verification=pack.verification,
            )
    return out


def _pack(spec: DataSpec, pack_dir: Path | None) -> tuple[packs.Pack, str | None]:
    """Return the pack of a source, by way of the cache if it is packed into a folder; and why that was not possible."""

    def produce(writer: packs.Writer) -> packs.Meta:
        return _produce(spec, writer)

    if pack_dir is None or packs.is_there(pack_dir):
        return packs.make(identity(spec), SPLITS, produce, pack_dir), None
    return pack_cache.make(spec, identity(spec), SPLITS, produce, pack_dir)


def open_source(spec: DataSpec) -> Documents:
    """Return the documents of a token source; close it when it is not read any more."""
    return OwnDocuments(spec) if gives_documents(spec) else documents(spec)


def _produce(spec: DataSpec, writer: packs.Writer) -> packs.Meta:
    source = open_source(spec)
    with closing(Spooled(source) if source.in_order else source) as ready:
        return _write_splits(spec, ready, writer)


def _write_splits(spec: DataSpec, source: Documents, writer: packs.Writer) -> packs.Meta:
    fraction = getattr(spec, "validation", 0.0)
    held = source.held_out(fraction)
    facts: packs.Meta = {"meaning": {"vocab": source.vocab, "bos": source.bos}}
    wanted_held = bool(fraction) or bool(getattr(spec, "validation_paths", ()))
    seq_len: int = spec.seq_len  # type: ignore[attr-defined]
    for split, mine in zip(SPLITS, (~held, held), strict=True):
        facts[f"{split}_bytes"] = _write(source, np.flatnonzero(mine), split, writer)
        if not writer.entries[f"{split}-starts"]["size"] and (split == "train" or wanted_held):
            raise UserError(
                f"{type(spec).__name__} data",
                expected=f"at least one document with content in the {split} split",
                got=f"{int(mine.sum())} of {counted(len(source), 'documents')}, all {source.nothing}"
                if mine.any()
                else "none",
                do="Add documents, change validation (the fraction held out), or name validation_paths.",
            )
        # Check before the pack is stored: a stored pack would still be too small after documents are added.
        if split == "train":
            tokens = writer.entries["train-tokens"]["size"]
            least = seq_len if getattr(spec, "packing", "windows") == "windows" else 1
            require_window(split, tokens, writer.entries["train-starts"]["size"], least)
    facts["passed_over"] = source.passed.sentences(type(spec).__name__)
    return facts


def require_window(split: str, tokens: int, documents: int, seq_len: int) -> None:
    """Raise UserError if a stream is shorter than one window. A validation split may be, since it is padded."""
    needed = seq_len + 1 if split == "train" else 2
    if tokens < needed:
        raise UserError(
            f"{split} data",
            expected=f"at least {counted(needed, 'tokens')}, one window of seq_len={seq_len} and its last target",
            got=f"{counted(tokens, 'tokens')} in {counted(documents, 'documents')}",
            do="Add documents, use a smaller seq_len, or change the fraction held out (validation).",
        )


def _write(source: Documents, numbers: np.ndarray, split: str, writer: packs.Writer) -> int | None:
    """Write the documents ``numbers`` in permuted order; return the number of source bytes, or None if unknown."""
    starts: list[int] = []
    targets = bytearray()
    n_bytes: int | None = 0
    # The permutation does not use the run's seed: one pack serves all seeds, and windows are permuted by the seed.

    if len(numbers):
        numbers = numbers[Permutation(len(numbers), 0, f"data/documents/{split}")(np.arange(len(numbers)))]

    def pieces(write: Callable[[np.ndarray], None]) -> None:
        nonlocal n_bytes
        at = 0
        for number in numbers.tolist():
            tokens, mask, size = source.read_masked(number)
            if len(tokens):
                check_ids_of(source, number, tokens)
                if source.masked:
                    targets.append(0)  # the token that opens the document
                    targets.extend((np.ones(len(tokens), bool) if mask is None else mask).tobytes())
                write(np.concatenate((np.array([source.bos], dtype), tokens), dtype=dtype, casting="same_kind"))
                starts.append(at)
                at += 1 + len(tokens)
                n_bytes = None if size is None or n_bytes is None else n_bytes + size
            else:
                source.passed.add(source.nothing, source.files[int(source.file[number])][0])

    dtype = np.min_scalar_type(source.vocab - 1)
    writer.array(f"{split}-tokens", dtype, pieces)
    writer.whole(f"{split}-starts", np.array(starts, np.int64))
    if source.masked:
        writer.whole(f"{split}-targets", np.frombuffer(bytes(targets), np.uint8))
    return n_bytes
