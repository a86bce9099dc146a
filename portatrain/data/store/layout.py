"""The format of a packed store.

A store has a manifest, ``store.json``, and for each split the shards ``SPLIT-00000.tokens``, ``SPLIT-00001.tokens``,
and so on. The shards of a split are its stream of tokens, cut after every ``shard_blocks`` blocks; documents go on from
one shard to the next. So token t is in block t div TOKENS of the stream, and block b in shard b div ``shard_blocks``.

A block is TOKENS ids, little-endian; a bit for each, 1 where a document begins (bit i is bit i mod 8, from the lowest,
of byte i div 8); if the store is ``masked``, as one of chats, another bit for each, 1 if it is a target; and the CRC-32
of all this. The last block of a stream is filled up with zeros. `block_dtype` says the
same to NumPy.

The manifest is written last and in one step: a folder without it is no store. It has the SHA-256 of every shard, and of
itself. The fingerprint of a split is the SHA-256 of what says what its tokens are: their number, the vocabulary, the
sums of the shards.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from portatrain.errors import UserError
from portatrain.system import json_files

FORMAT = "portatrain-store-1"
MANIFEST = "store.json"
TOKENS = 8192
"""Tokens in a block."""
DTYPES = ("uint8", "uint16", "uint32")
LENGTHS = 40
"""Classes of document lengths: class i has the documents of 2^i to 2^(i+1) - 1 tokens."""

Meta = dict[str, Any]


def block_dtype(ids: str, masked: bool = False) -> np.dtype:
    """Return the dtype of a block of tokens of the type `ids`, such as 'uint16'."""
    tokens, bits = np.dtype(ids).newbyteorder("<"), (TOKENS // 8,)
    masks = [("targets", np.uint8, bits)] if masked else []
    return np.dtype([("tokens", tokens, (TOKENS,)), ("starts", np.uint8, bits), *masks, ("crc", "<u4")])


def seal(ids: np.ndarray, starts: np.ndarray, targets: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return the blocks, (n,) of `kind`, of n * TOKENS ids; `starts`, bool, marks those that begin documents, and
    `targets` those that are targets."""
    blocks = np.zeros(len(ids) // TOKENS, kind)
    blocks["tokens"] = ids.reshape(-1, TOKENS)
    blocks["starts"] = np.packbits(starts.reshape(-1, TOKENS), axis=1, bitorder="little")
    if "targets" in (kind.names or ()):
        blocks["targets"] = np.packbits(targets.reshape(-1, TOKENS), axis=1, bitorder="little")
    blocks["crc"] = sums(blocks)
    return blocks


def sums(blocks: np.ndarray) -> np.ndarray:
    """Return the CRC-32 that each block should have, (n,) uint32."""
    size = blocks.dtype.itemsize
    data = memoryview(np.ascontiguousarray(blocks).view(np.uint8).data)
    found = [zlib.crc32(data[i * size : i * size + size - 4]) for i in range(len(blocks))]
    return np.array(found, np.uint32)


def opened(blocks: np.ndarray) -> np.ndarray:
    """Return (n * TOKENS,) bool, True for the tokens of (n,) blocks that begin a document."""
    return np.unpackbits(blocks["starts"].reshape(-1), bitorder="little").view(bool)


def are_targets(blocks: np.ndarray) -> np.ndarray | None:
    """Return (n * TOKENS,) bool, which tokens of (n,) blocks are targets, or None if the store does not say."""
    if "targets" not in (blocks.dtype.names or ()):
        return None
    return np.unpackbits(blocks["targets"].reshape(-1), bitorder="little").view(bool)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tokens"


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What a store says of a split. bytes: of the source, or None if they are unknown. sha256: of every shard.
    lengths: the documents by length, see LENGTHS. longest: tokens of the longest document. groups: see
    `packing.py`."""

    tokens: int
    documents: int
    bytes: int | None
    longest: int
    groups: int
    lengths: tuple[int, ...]
    sha256: tuple[str, ...]

    def as_json(self) -> Meta:
        return {**vars(self), "lengths": list(self.lengths), "sha256": list(self.sha256)}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> SplitFacts:
        """Raises KeyError, TypeError or ValueError if `row` is something else."""
        whole = {k: row[k] for k in ("tokens", "documents", "bytes", "longest", "groups")}
        if not all(type(v) is int and 0 <= v < 2**62 for k, v in whole.items() if (k, v) != ("bytes", None)):
            raise ValueError("numbers that no split can have")
        if not all(isinstance(v, str) and len(v) == 64 for v in row["sha256"]):
            raise ValueError("sums that are none")
        return cls(**whole, lengths=tuple(map(int, row["lengths"])), sha256=tuple(row["sha256"]))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store says of itself. made_from: the facts that determine it; made_with: the versions that made it.
    masked: whether it says which tokens are targets."""

    dtype: str
    vocab: int
    bos: int
    shard_blocks: int
    made_from: Meta
    splits: Mapping[str, SplitFacts]
    made_with: Meta = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    masked: bool = False

    def block(self) -> np.dtype:
        return block_dtype(self.dtype, self.masked)

    def blocks_in(self, split: str, shard: int) -> int:
        """Return the number of blocks in a shard."""
        whole = -(-self.splits[split].tokens // TOKENS)
        return min(self.shard_blocks, whole - shard * self.shard_blocks)

    def shards(self) -> list[tuple[str, int]]:
        """Return (split, number) of every shard."""
        return [(split, n) for split, facts in self.splits.items() for n in range(len(facts.sha256))]

    def split_fingerprint(self, split: str) -> str:
        facts = self.splits[split]
        meaning = {"dtype": self.dtype, "vocab": self.vocab, "bos": self.bos, "tokens": facts.tokens}
        meaning |= {"masked": True} if self.masked else {}
        text = json.dumps([FORMAT, split, meaning, facts.documents, self.shard_blocks, facts.sha256], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the fingerprints of the splits, in hex."""
        text = json.dumps([FORMAT, {split: self.split_fingerprint(split) for split in sorted(self.splits)}])
        return hashlib.sha256(text.encode()).hexdigest()

    def as_bytes(self) -> bytes:
        meta: Meta = {
            "format": FORMAT,
            "block_tokens": TOKENS,
            "dtype": self.dtype,
            "vocab": self.vocab,
            "bos": self.bos,
            "masked": self.masked,
            "shard_blocks": self.shard_blocks,
            "made_from": self.made_from,
            "made_with": self.made_with,
            "passed_over": list(self.passed_over),
            "splits": {split: facts.as_json() for split, facts in self.splits.items()},
            "fingerprint": self.fingerprint,
        }
        return checked(meta)


def checked(meta: Meta) -> bytes:
    """Return a JSON object with a sum of itself under the key `check`."""
    return json.dumps({**meta, "check": _check(meta)}, indent=1, allow_nan=False).encode()


def _check(meta: Meta) -> str:
    text = json.dumps({k: v for k, v in meta.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sound(data: bytes) -> Meta:
    """Return the object that `checked` wrote. Raises ValueError if it is something else."""
    meta = json_files.loads(data)
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), str):
        raise ValueError("something else than an object with a format")
    if meta["format"] == FORMAT and meta.get("check") != _check(meta):
        raise ValueError("another checksum than its own")
    return cast(Meta, meta)


def parse(where: str, data: bytes) -> Manifest:
    """Return the manifest of the store at `where`. Raises UserError if it is damaged or of another version."""
    try:
        meta = sound(data)
        if meta["format"] != FORMAT:
            raise UserError(
                f"packed store {where}",
                expected=f"the format {FORMAT!r}",
                got=repr(meta["format"]),
                do="Read it with the release of portatrain that packed it, or pack it again with this one.",
            )
        if meta["block_tokens"] != TOKENS or meta["dtype"] not in DTYPES or type(meta["shard_blocks"]) is not int:
            raise ValueError("blocks of another size or kind")
        made = Manifest(
            **{k: meta[k] for k in ("dtype", "vocab", "bos", "masked", "shard_blocks", "made_from", "made_with")},
            passed_over=tuple(meta["passed_over"]),
            splits={split: SplitFacts.of(row) for split, row in meta["splits"].items()},
        )
        for split, facts in made.splits.items():
            blocks = -(-facts.tokens // TOKENS)
            shards = -(-blocks // made.shard_blocks)
            if shards != len(facts.sha256) or not split.isalpha():
                raise ValueError(f"{len(facts.sha256)} shards of {split} instead of {shards}")
        if made.fingerprint != meta["fingerprint"]:
            raise ValueError("another fingerprint than its own")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"packed store {where}",
            expected=f"a {MANIFEST} as portatrain wrote it",
            got=str(error),
            do="Restore it from a copy, or delete the store and pack it again.",
        ) from error
    return made
