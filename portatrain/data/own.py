"""The two contracts for a data source of your own: it has the members of `DocumentSource` or of `ArraySource`.

Such a source is a frozen dataclass that derives from `DataSpec`, in a recipe file or in a package of yours. Its fields
are part of the recipe: they are saved with the run, and ``--set data.FIELD=VALUE`` changes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeGuard

from portatrain.data.spec import DataSpec, has_tokens
from portatrain.errors import UserError


class DocumentSource(Protocol):
    """Documents of text, which are tokenized, packed and cut into windows of ``seq_len`` targets.

    The source is read once, when the run begins; the run keeps the packed tokens. The fingerprint of the data follows
    from these tokens, so the source may move. Such a source can be one of the sources of a `Mixture`.

    These fields are optional: ``validation`` (fraction of the documents to hold out, selected by a hash of the name;
    without the field, none), ``tokenizer`` and ``bos`` (as in `TextFiles`; without them, each byte is a token).
    """

    @property
    def seq_len(self) -> int:
        """The number of targets in a window."""

    def documents(self) -> Iterable[tuple[str, bytes | str]]:
        """Yield (name, text) of every document. The names are all different; the order does not matter."""


class ArraySource(Protocol):
    """Samples by index, for images, regression, pairs and all else: each sample is a dictionary of arrays.

    A batch has the keys of a sample, each with a leading batch axis, and in addition ``mask`` (B,) float32, unless a
    sample has a ``mask`` of its own, and ``sample`` (B,) int64, the sample numbers. 64-bit numbers become 32-bit ones.

    These are optional: ``validation_len()`` and ``validation_sample(index)`` give the validation split. Without them, a
    field ``validation`` is the fraction of the samples to hold out, selected by a hash of the index; without both,
    nothing is held out. ``vocab`` is the number of token ids, if a sample has any. A source with a field ``seq_len``
    has samples of that many tokens.
    """

    @property
    def version(self) -> str:
        """The version of the contents; change it when they change. The fingerprint has it, the class and the fields."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def sample(self, index: int) -> Mapping[str, Any]:
        """Return sample ``index``, the same at every call; every sample has the same keys, shapes and dtypes."""


def gives_documents(spec: DataSpec) -> TypeGuard[DocumentSource]:
    """Return True if ``spec`` has the required members of a `DocumentSource`."""
    return callable(getattr(spec, "documents", None)) and hasattr(spec, "seq_len")


def gives_arrays(spec: DataSpec) -> TypeGuard[ArraySource]:
    """Return True if ``spec`` has what an `ArraySource` must have."""
    return callable(getattr(spec, "sample", None)) and hasattr(type(spec), "__len__") and hasattr(spec, "version")


def gives_tokens(spec: DataSpec) -> bool:
    """Return True for a source of tokens, of text or of documents: what a mixture is made of."""
    return has_tokens(spec) or gives_documents(spec)


def refusal(spec: DataSpec) -> UserError:
    """Return the error for a data spec from which nothing can be read."""
    kind = type(spec).__name__
    return UserError(
        f"data spec {kind}",
        expected="documents() and seq_len, or __len__(), sample(index) and version (portatrain.data.own)",
        got="a class with " + (", ".join(n for n in dir(type(spec)) if not n.startswith("_")) or "none of them"),
        do="Add the methods of one of the two kinds of sources.",
    )
