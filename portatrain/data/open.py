"""`open_data`: find, pack and split the data of a spec."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data.corpus import Stream, streams
from portatrain.data.digits import blank as blank_digits
from portatrain.data.digits import open_digits
from portatrain.data.mixture import Chained, Mixed
from portatrain.data.own import gives_arrays, gives_tokens, refusal
from portatrain.data.own_arrays import blank as blank_arrays
from portatrain.data.own_arrays import example, open_arrays
from portatrain.data.pack import Verification
from portatrain.data.preferences import open_pairs
from portatrain.data.spec import PACKINGS, DataSpec, Digits, Mixture, PackedTokens, Preferences
from portatrain.data.split import Batch, Split
from portatrain.data.store.reading import PackedStream, streams_of
from portatrain.data.text_batches import TokenSplit, Whole, Windows
from portatrain.data.text_batches import blank as blank_windows
from portatrain.errors import UserError
from portatrain.system.paths import expand
from portatrain.system.text import counted

Streams = Mapping[str, Stream | PackedStream]


@dataclass(frozen=True, kw_only=True)
class OpenData:
    """Opened data.

    Attributes:
        train, validation: the splits; validation is None if nothing is held out.
        vocab: number of token ids, or of classes; 0 if a source of arrays does not say.
        bytes_per_target: that number of the validation split or, without one, of the training split; see `Split`.
        fingerprint: SHA-256, in hex, of the fingerprints of the splits.
        streams: the packed token streams by split if the data is a single token source; otherwise empty.
        passed_over: sentences about what the sources hold and was not packed.
        verifications: checks, to be started, of the packed corpora that were too large to be verified when opened.
    """

    train: Split
    validation: Split | None
    vocab: int
    streams: Streams
    passed_over: tuple[str, ...] = ()
    verifications: tuple[Verification, ...] = ()

    def verify_in_background(self) -> None:
        """Begin to read all of the packed corpora that were not verified when they were opened."""
        for verification in self.verifications:
            verification.start()

    def check(self) -> None:
        """Raise UserError if damage has been found in the background. Does not wait."""
        for verification in self.verifications:
            verification.check()

    @property
    def bytes_per_target(self) -> float | None:
        return (self.validation or self.train).bytes_per_target

    @property
    def fingerprint(self) -> str:
        held = self.validation.fingerprint if self.validation else ""
        return hashlib.sha256(f"portatrain.data.1\0{self.train.fingerprint}\0{held}".encode()).hexdigest()


def open_data(spec: DataSpec, *, seed: int, pack_dir: Path | str | None = None) -> OpenData:
    """Find, pack and split the data of ``spec``.

    Args:
        seed: determines the order of the windows in every epoch, and nothing else.
        pack_dir: folder of the packed corpus. If it has one, that is read, and the source need not exist; otherwise it
            is written there. None: it is kept in memory.

    Raises:
        UserError: the source is missing, malformed, or too small; the packed corpus is damaged or has other data.
    """
    pack_dir = None if pack_dir is None else Path(os.path.abspath(expand(pack_dir)))
    _check(spec)
    if isinstance(spec, Digits):
        splits = open_digits(spec, seed, pack_dir)
        return OpenData(train=splits["train"], validation=splits.get("validation"), vocab=10, streams={})
    if isinstance(spec, Preferences):
        return _open_preferences(spec, seed, pack_dir)
    if isinstance(spec, Mixture):
        return _open_mixture(spec, seed, pack_dir)
    if not gives_tokens(spec) and gives_arrays(spec):
        arrays = open_arrays(spec, seed)
        vocab = int(getattr(spec, "vocab", 0))
        return OpenData(train=arrays["train"], validation=arrays.get("validation"), vocab=vocab, streams={})
    found = _streams(spec, pack_dir)
    windows = _windows(spec, found, seed, "data")
    return OpenData(
        train=windows["train"],
        validation=windows.get("validation"),
        vocab=found["train"].vocab,
        streams=found,
        **_told([found]),
    )


def _open_preferences(spec: Preferences, seed: int, pack_dir: Path | None) -> OpenData:
    pairs = open_pairs(spec, seed, pack_dir)
    train = pairs["train"].stream
    longer = sum(split.longer for split in pairs.values())
    told = (f"Preferences: {counted(longer, 'pairs')} longer than seq_len={spec.seq_len}",) if longer else ()
    return OpenData(
        train=pairs["train"],
        validation=pairs.get("validation"),
        vocab=train.vocab,
        streams={},
        passed_over=(*train.passed_over, *told),
        verifications=() if train.verification is None else (train.verification,),
    )


def _open_mixture(spec: Mixture, seed: int, pack_dir: Path | None) -> OpenData:
    for source in spec.sources:
        _check(source)
        if not gives_tokens(source):
            raise UserError(
                "Mixture sources",
                expected="token sources, or sources of documents",
                got=f"{type(source).__name__}, which is neither",
                do="Leave it out of the mixture, or mix inside a source of arrays of your own.",
            )
    found = [_streams(s, pack_dir / f"source-{i}" if pack_dir else None) for i, s in enumerate(spec.sources)]
    vocabs = sorted({f["train"].vocab for f in found})
    if len(vocabs) > 1:
        raise UserError(
            "Mixture sources",
            expected="sources with the same vocabulary",
            got=f"vocabularies of {', '.join(map(str, vocabs))} ids",
            do="Use one tokenizer for all sources.",
        )
    parts = [_windows(s, f, seed, f"data/source/{i}") for i, (s, f) in enumerate(zip(spec.sources, found, strict=True))]
    held = {number: p["validation"] for number, p in enumerate(parts) if "validation" in p}
    return OpenData(
        train=Mixed(spec, [p["train"] for p in parts], name="train", seed=seed),
        validation=Chained(spec, held, name="validation") if held else None,
        vocab=vocabs[0],
        streams={},
        **_told(found),
    )


def _streams(spec: DataSpec, pack_dir: Path | None) -> Streams:
    return streams_of(spec) if isinstance(spec, PackedTokens) else streams(spec, pack_dir)


def _told(sources: Sequence[Streams]) -> dict[str, Any]:
    """Return what the packs of all sources say of themselves, as fields of `OpenData`."""
    trained = [source["train"] for source in sources]
    return {
        "passed_over": tuple(sentence for stream in trained for sentence in stream.passed_over),
        "verifications": tuple(stream.verification for stream in trained if stream.verification is not None),
    }


def _windows(spec: DataSpec, found: Streams, seed: int, where: str) -> dict[str, TokenSplit]:
    seq_len: int = spec.seq_len  # type: ignore[attr-defined]
    packing = getattr(spec, "packing", PACKINGS[0])
    out: dict[str, TokenSplit] = {}
    for name, stream in found.items():
        about: Any = {"name": name, "seq_len": seq_len, "seed": seed, "permuted": name == "train"}
        about["order"] = f"{where}/{name}"
        if packing == PACKINGS[0] or not isinstance(stream, Stream):  # a store is read by windows
            out[name] = Windows(stream, **about)
        else:
            out[name] = Whole(stream, **about, single=packing == "single")
    return out


def _check(spec: DataSpec) -> None:
    kind = type(spec).__name__
    if not isinstance(spec, DataSpec):
        raise UserError(
            "data spec",
            expected="a frozen dataclass that derives from portatrain.data.DataSpec",
            got=f"a {kind}",
            do="Use one of ArrayRecords, Arrow, Digits, Jsonl, Megatron, Mixture, PackedTokens, Parquet, "
            "Preferences, Stdlib, TextFiles, TokenMemmap, or derive one of your own.",
        )
    if not (gives_tokens(spec) or isinstance(spec, (Digits, Mixture, Preferences)) or gives_arrays(spec)):
        raise refusal(spec)
    spec.check_fields()  # a class of its own may have replaced __post_init__


def is_packable(spec: DataSpec) -> bool:
    """Return True for a source of documents that is not packed yet."""
    _check(spec)
    return gives_tokens(spec) and not isinstance(spec, PackedTokens)


def blank_batch(spec: DataSpec, count: int) -> Batch:
    """Return ``count`` padding rows of the data of ``spec``, for their keys, shapes and dtypes.

    Nothing is opened, except for the first sample of a source of arrays.
    """
    if isinstance(spec, Digits):
        return blank_digits(count)
    if isinstance(spec, Mixture):
        return blank_batch(spec.sources[0], count) | {"source": np.zeros(count, np.int32)}
    if not gives_tokens(spec) and gives_arrays(spec):
        return blank_arrays(example(spec), count)
    return blank_windows(count, spec.tokens_per_sample() or 1)
