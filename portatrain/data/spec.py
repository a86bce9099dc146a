"""Data specs: frozen dataclasses that say which data a run trains on.

Text sources share these fields:

- ``seq_len``: number of targets in a window.
- ``validation``: fraction of the documents to hold out for validation, selected by a hash of the document's name.
- ``validation_paths``: files to hold out for validation, in place of a fraction. (): the fraction applies.
- ``tokenizer``: path of a local ``tokenizer.json``. None: each byte is a token.
- ``bos``: name of the token that begins every document, one of the tokenizer's. None: an additional id after the
  tokenizer's last. If bytes are tokens, bos must be None, and id 0 begins every document.

A source of your own derives from `DataSpec` and has the methods of one of the Protocols in `portatrain.data.own`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Base class of all data specs."""

    def tokens_per_sample(self) -> int | None:
        """Return the number of tokens of a sample; None if a sample is not a sequence of tokens."""
        length: int | None = getattr(self, "seq_len", None)
        return length


@dataclass(frozen=True, kw_only=True)
class Stdlib(DataSpec):
    """The source code of the running Python's standard library; each .py file is a document.

    It excludes site-packages, tests (folders ``test``, ``tests``, ``idle_test``) and ``_sysconfigdata*.py``, which
    contains paths of the machine that built the interpreter. Equal Python releases therefore give equal corpora.
    """

    seq_len: int
    validation: float = 0.1
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextFiles(DataSpec):
    """Text files; each file is a document.

    The name of a document is its path relative to the folder, or to the fixed part of the glob. The corpus can
    therefore be moved without changing the samples.
    """

    paths: str | tuple[str, ...]
    """Files, folders (all files below them) or globs (``**`` matches folders at any depth)."""
    seq_len: int
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class Jsonl(DataSpec):
    """JSON lines; each line is an object with one document. Blank lines are skipped.

    The name of a document is the name of its file, as in `TextFiles`, and its line number.
    """

    paths: str | tuple[str, ...]
    """As in `TextFiles`."""
    seq_len: int
    field: str = "text"
    """The key of the document's text in each object."""
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenMemmap(DataSpec):
    """Files of token ids, raw and little-endian, as other tools write them."""

    paths: str | tuple[str, ...]
    """As in `TextFiles`."""
    seq_len: int
    vocab: int
    """Number of token ids, including the separator."""
    dtype: str = "uint16"
    """The integer type of the ids in the files."""
    separator: int | None = None
    """The id before or after each document in the files; here it begins every document. None: each file is one
    document, and id 0 begins it."""
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedTokens(DataSpec):
    """A packed store, as ``portatrain data pack`` writes it. It is read where it is, and not copied into the run."""

    path: str
    """The folder of the store, or its URL."""
    seq_len: int
    fingerprint: str = ""
    """The fingerprint that the store must have, as ``portatrain data show`` prints it. '': any."""


@dataclass(frozen=True, kw_only=True)
class Digits(DataSpec):
    """The 1,797 handwritten digits of scikit-learn: images of 8 x 8 pixels in ten classes."""

    validation: float = 0.2
    """Fraction of the images to hold out for validation, selected by a hash of the image's index."""


@dataclass(frozen=True, kw_only=True)
class Mixture(DataSpec):
    """Several token sources in fixed proportions.

    The sequence of samples is divided into blocks. Each block has an exact number of samples from every source, in
    permuted order.
    """

    sources: tuple[DataSpec, ...]
    """Token sources with the same ``seq_len``."""
    weights: tuple[float, ...]
    """Proportion of each source; they need not sum to 1."""
    block: int = 1024
    """Samples per block."""
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Later changes of the weights: pairs (first block, weights), with increasing first blocks of at least 1. (): the
    weights do not change."""

    def tokens_per_sample(self) -> int | None:
        """Return the number of tokens of a sample, which is the same for all sources."""
        return self.sources[0].tokens_per_sample() if self.sources else None
