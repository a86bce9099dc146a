"""Data specs: frozen dataclasses that say which data a run trains on.

Sources of tokens share these fields:

- ``seq_len``: number of targets in a sample.
- ``validation``: fraction of the documents to hold out for validation, selected by a hash of the document's name.
- ``packing``: how documents fill samples. ``"windows"``: documents follow each other and are cut where a sample ends.
  ``"best-fit"``: each document stays whole, and samples are filled by best fit. ``"single"``: one document a sample.
  The last two pad, and cut only a document that is longer than a sample.

Sources of files also share these:

- ``paths``: files, folders (all files below them) or globs (``**`` matches folders at any depth), on disk or below
  s3://, gs:// or az://.
- ``validation_paths``: files to hold out for validation, in place of a fraction. (): the fraction applies.

Text sources share these fields:

- ``tokenizer``: path of a local ``tokenizer.json``. None: each byte is a token.
- ``bos``: name of the token that begins every document, one of the tokenizer's. None: an additional id after the
  tokenizer's last. If bytes are tokens, bos must be None, and id 0 begins every document.

Sources of records (objects with fields) also share these, which say what a document is:

- ``field``: the field that holds a document's text; not used if one of the next two is given.
- ``template``: a document's text as a Jinja template over the fields, such as ``"{{ title }}: {{ text }}"``.
- ``messages``: the field that holds a chat, a list of messages with ``role`` and ``content``. It is rendered by the
  tokenizer's chat template, and only the answers are targets.
- ``chat_template``: path of a chat template. None: the tokenizer's own.

A source of your own derives from `DataSpec` and has the methods of one of the Protocols in `portatrain.data.own`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from portatrain.config import added_later, require
from portatrain.data import mixture_fields
from portatrain.errors import choice

PACKINGS = ("windows", "best-fit", "single")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Base class of all data specs.

    Raises:
        UserError: a field that sources share, such as ``seq_len``, ``vocab`` or ``validation``, is out of range.
    """

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Raise UserError for a field that sources share and whose value is out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, least, below, words in (
            ("seq_len", 1, 2**31, "the number of targets in a sample, at least 1"),
            ("vocab", 1, math.inf, "the number of token ids, at least 1"),
            ("separator", 0, math.inf, "a token id, at least 0, or none"),
        ):
            if (value := given.get(name)) is not None or name == "seq_len" in given:
                require(self, name, isinstance(value, int) and least <= value < below, words)
        held_out, packing = given.get("validation", 0.0), given.get("packing", PACKINGS[0])
        fraction = isinstance(held_out, (int, float)) and 0 <= held_out < 1
        require(self, "validation", fraction, "a fraction of the documents to hold out, from 0 to below 1")
        if packing not in PACKINGS:
            raise choice(f"{type(self).__name__} packing", str(packing), PACKINGS)

    def tokens_per_sample(self) -> int | None:
        """Return the number of tokens of a sample; None if a sample is not a sequence of tokens."""
        length: int | None = getattr(self, "seq_len", None)
        return length


@dataclass(frozen=True, kw_only=True)
class _Tokens(DataSpec):
    """The fields of every source of tokens here."""

    seq_len: int
    validation: float = 0.1
    packing: Literal["windows", "best-fit", "single"] = added_later("windows")


@dataclass(frozen=True, kw_only=True)
class _Text(_Tokens):
    """The fields of every source of text here."""

    tokenizer: str | None = None
    bos: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Files(_Tokens):
    """The fields of every source of files."""

    paths: str | tuple[str, ...]
    validation_paths: str | tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Records(_Files, _Text):
    """The fields of every source of records."""

    field: str = "text"
    template: str | None = added_later(None)
    messages: str | None = added_later(None)
    chat_template: str | None = added_later(None)


def has_tokens(spec: DataSpec) -> bool:
    """Return True for a source of tokens of this module."""
    return isinstance(spec, (_Tokens, PackedTokens))


def has_text(spec: DataSpec) -> bool:
    """Return True for a source of text of this module; without a tokenizer each of its tokens is a byte."""
    return isinstance(spec, (_Text, Preferences))


@dataclass(frozen=True, kw_only=True)
class Stdlib(_Text):
    """The source code of the running Python's standard library; each .py file is a document.

    It excludes site-packages, tests (folders ``test``, ``tests``, ``idle_test``) and ``_sysconfigdata*.py``, which
    contains paths of the machine that built the interpreter. Equal Python releases therefore give equal corpora.
    """


@dataclass(frozen=True, kw_only=True)
class TextFiles(_Files, _Text):
    """Text files; each file is a document.

    The name of a document is its path relative to the folder, or to the fixed part of the glob. The corpus can
    therefore be moved without changing the samples.
    """


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Records):
    """JSON lines; each line is an object with one document. Blank lines are skipped.

    The files are plain, or compressed by gzip or zstd; their first bytes decide, and not their names. The name of a
    document is the name of its file, as in `TextFiles`, and its line number.
    """


@dataclass(frozen=True, kw_only=True)
class Parquet(_Records):
    """Parquet files; each row has one document. Row groups are read by range, and of a row only the columns it takes.

    The name of a document is the name of its file, as in `TextFiles`, and its row number.
    """


@dataclass(frozen=True, kw_only=True)
class Arrow(_Records):
    """Arrow files, as a stream or a file of record batches, such as Hugging Face's `datasets` writes.

    Each row has one document. In the folder of a dataset (``save_to_disk``) the files of its ``state.json`` are read; a
    folder of several splits is named by its split, such as ``paths="corpus/train"``.
    """


@dataclass(frozen=True, kw_only=True)
class ArrayRecords(_Records):
    """ArrayRecord files; each record has one document.

    A record is a JSON object with ``field``, or with what ``template`` or ``messages`` takes. If ``field`` is "", the
    record itself is the text.
    """

    field: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenMemmap(_Files):
    """Files of token ids, raw and little-endian, as other tools write them (nanoGPT, llm.c, `numpy.save`)."""

    vocab: int
    """Number of token ids, including the separator."""
    dtype: str = "uint16"
    """The integer type of the ids in the files."""
    separator: int | None = None
    """The id before or after each document in the files; here it begins every document. None: each file is one
    document, and id 0 begins it."""


@dataclass(frozen=True, kw_only=True)
class Megatron(_Files):
    """Token files of Megatron-LM: each .bin file has an .idx file beside it, which says where documents begin.

    Name either of the two files, or a folder or a glob; a .bin file without an .idx file is refused.
    """

    vocab: int
    """Number of token ids, including the separator."""
    separator: int | None = None
    """The id that ends each document in the files (``--append-eod``); here it begins every document. None: id 0 begins
    it, and every id of the files is a target."""


@dataclass(frozen=True, kw_only=True)
class PackedTokens(DataSpec):
    """A packed store, as ``portatrain data pack`` writes it. It is read where it is, and not copied into the run."""

    path: str
    """The folder of the store, or its URL."""
    seq_len: int
    fingerprint: str = ""
    """The fingerprint that the store must have, as ``portatrain data show`` prints it. '': any."""
    skip_shards: tuple[str, ...] = added_later(())
    """Shards that are damaged or away, such as train-00003.tokens, and are not read: their tokens are blank, are no
    targets, and nothing attends to them. All samples keep their numbers."""


@dataclass(frozen=True, kw_only=True)
class Preferences(DataSpec):
    """Pairs of chats of which one was preferred, for DPO; each record has one pair, and so has each sample.

    The chats are rendered by a chat template, as those of ``messages`` are. Targets are the answers in which the two
    differ. In a sample the chosen chat is segment 1, the rejected one segment 2, and padding follows; a pair that is
    longer than a sample is passed over, counted and named.
    """

    paths: str | tuple[str, ...]
    validation_paths: str | tuple[str, ...] = ()
    seq_len: int
    """Number of targets in a sample, of both sides together."""
    validation: float = 0.1
    """Fraction of the pairs to hold out for validation, selected by a hash of the record's name."""
    format: Literal["jsonl", "parquet", "arrow"] = "jsonl"
    """What the files are, as `Jsonl`, `Parquet` and `Arrow` read them."""
    chosen: str = "chosen"
    """The field with the preferred chat: a list of messages, or a text, which is one answer to ``prompt``."""
    rejected: str = "rejected"
    """The field with the other chat, in the same form."""
    prompt: str | None = None
    """The field with the messages that both sides begin with, or a text, which is one message of the user. None: each
    side is a whole chat."""
    tokenizer: str | None = None
    bos: str | None = None
    chat_template: str | None = None


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
    names: tuple[str, ...] = added_later(())
    """A name for each source. Evaluations report ``loss/NAME`` and ``bits_per_byte/NAME``; sources with the same name
    are reported together. (): source-0, source-1 and so on."""
    exhausted: Literal["repeat", "error"] = added_later("repeat")
    """What happens if the run needs more samples of a source than it has: repeat begins its next epoch, in another
    order; error refuses the run before it begins."""

    def check_fields(self) -> None:
        super().check_fields()
        mixture_fields.check(self)

    def tokens_per_sample(self) -> int | None:
        """Return the number of tokens of a sample, which is the same for all sources."""
        return self.sources[0].tokens_per_sample() if self.sources else None
