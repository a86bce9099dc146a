"""What a store is packed from: an unfinished one goes on only with the same documents, tokenizer and releases."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from portatrain.data.documents import Documents
from portatrain.data.spec import DataSpec
from portatrain.data.store.layout import Meta
from portatrain.errors import UserError
from portatrain.system.paths import expand


def require_same(where: str, theirs: Meta, ours: Meta) -> None:
    keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
    if keys:
        raise UserError(
            f"packed store {where}",
            expected=", ".join(f"{k}={ours.get(k)!r}" for k in keys),
            got=f"one made with {', '.join(f'{k}={theirs.get(k)!r}' for k in keys)}",
            do="Name another place, or delete this store.",
        )


def require_begun(where: str, theirs: Meta, ours: Meta) -> None:
    """Raise UserError if a store was begun with something else than `ours` says."""
    for key, words in (
        ("made_from", "the same source, fields and tokenizer"),
        ("source", "the same documents as when it was begun"),
        ("made_with", "the same releases as when it was begun"),
        ("shard_blocks", "the same size of shards"),
    ):
        was, now = theirs.get(key), ours[key]
        if was != now:
            names = []
            if isinstance(was, dict) and isinstance(now, dict):
                names = sorted(k for k in {**was, **now} if was.get(k) != now.get(k))
            raise other(where, words, f"others ({', '.join(names)})" if names else "others")


def other(where: str, expected: str, got: str) -> UserError:
    return UserError(
        f"unfinished store {where}",
        expected=expected,
        got=got,
        do="Restore what has changed, or delete the unfinished store and pack it again.",
    )


def versions(spec: DataSpec) -> Meta:
    out = {}
    if getattr(spec, "tokenizer", None) is not None:
        import tokenizers

        out["tokenizers"] = tokenizers.__version__
    if type(spec).__name__ == "Stdlib":
        out["python"] = sys.version.split()[0]
    return out


def tokenizer_sum(spec: DataSpec) -> str | None:
    tokenizer = getattr(spec, "tokenizer", None)
    if tokenizer is None:
        return None
    path = expand(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # opening the source says what is wrong
        return None


def source_sum(source: Documents, held: np.ndarray) -> str:
    """Return a sum of the documents' names and of the sizes of their files."""
    digest = hashlib.sha256()
    for name, path in source.files:
        try:  # an own source's documents have no files
            size = path.stat().st_size if isinstance(path, Path) else path.size
        except OSError:
            size = -1
        digest.update(f"{name}\0{size}\0".encode("utf-8", "backslashreplace"))
    for array in (source.file, source.index, held):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
