"""What data a run trains on, as frozen dataclasses of plain Python values.

Every text source has: ``seq_len``, targets in a window; ``validation``, the fraction of documents held
out, chosen by a hash of the document's name; and tokens that are bytes unless ``tokenizer`` names a local
``tokenizer.json``. Token ``bos`` opens every document: 0 for bytes; with a tokenizer the name of one of its
tokens, or None for an id of its own after the tokenizer's last. ``validation_paths`` names documents that
are held out whatever their hash; where it is given, ``validation`` is not used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Base of all specs."""


@dataclass(frozen=True, kw_only=True)
class Stdlib(DataSpec):
    """The source code of the running Python's standard library; a document is a .py file.

    Left out: site-packages, tests (folders ``test``, ``tests``, ``idle_test``), and ``_sysconfigdata*.py``,
    which holds the paths of the machine that built the interpreter. So equal releases give equal corpora.
    """

    seq_len: int
    validation: float = 0.1
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextFiles(DataSpec):
    """Text files; a document is a file.

    ``paths``: files, folders (all files below) or globs (``**`` crosses folders). A document's name is its
    path from the folder or from the fixed part of the glob, so the corpus may be moved.
    """

    paths: str | tuple[str, ...]
    seq_len: int
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class Jsonl(DataSpec):
    """JSON lines; a document is the string under ``field`` of a line. Blank lines are passed over.

    ``paths`` as in `TextFiles`. A document's name is its file's name and its line.
    """

    paths: str | tuple[str, ...]
    seq_len: int
    field: str = "text"
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()
    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenMemmap(DataSpec):
    """Files of token ids, raw little-endian, as other tools leave them.

    ``separator``: the id that stands before or after each document, which then also opens every document
    here; None: a file is one document, and token 0 opens it. ``vocab``: number of ids, the separator too.
    """

    paths: str | tuple[str, ...]
    seq_len: int
    vocab: int
    dtype: str = "uint16"
    separator: int | None = None
    validation: float = 0.1
    validation_paths: str | tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Digits(DataSpec):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, ten classes; held out by a hash of the index."""

    validation: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Mixture(DataSpec):
    """Several token sources in fixed proportions.

    The sequence is cut into blocks of ``block`` samples; each holds an exact count of every source, permuted
    inside. ``weights`` are proportions. ``schedule`` changes them from a block on: pairs
    (first block, weights) in rising order.
    """

    sources: tuple[DataSpec, ...]
    weights: tuple[float, ...]
    block: int = 1024
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
