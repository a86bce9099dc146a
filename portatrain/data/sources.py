"""The source of a spec: its files, and the documents in them. Text files are read here."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import numpy as np

from portatrain.data.contents import check_text
from portatrain.data.documents import Documents
from portatrain.data.encode import Bytes, Encoding, encoding
from portatrain.data.finding import Files, PassedOver, Place, find, unreadable
from portatrain.data.megatron import MegatronDocuments
from portatrain.data.records import RecordDocuments
from portatrain.data.spec import DataSpec, Megatron, Preferences, Stdlib, TextFiles, TokenMemmap, _Files, _Records
from portatrain.data.token_files import TokenDocuments
from portatrain.errors import UserError


def documents(spec: DataSpec) -> Documents:
    """Return the documents of a token source."""
    if isinstance(spec, Stdlib):
        return _TextDocuments(stdlib_files(), [], PassedOver(), encoding(spec.tokenizer, spec.bos))
    if isinstance(spec, TextFiles):
        return _TextDocuments(*both(spec), encoding(spec.tokenizer, spec.bos))
    if isinstance(spec, _Records):
        return RecordDocuments(*both(spec), spec)
    if isinstance(spec, TokenMemmap):
        return TokenDocuments(*both(spec), spec)
    if isinstance(spec, Megatron):
        return MegatronDocuments(*both(spec), spec)
    raise TypeError(f"{type(spec).__name__} is not a source of tokens")


def documents_files(spec: DataSpec) -> Files | None:
    """Return all files that decide the documents of a source of text, in order, without reading them; None if other
    files do as well, as a chat template, or if it is another kind of source."""
    if isinstance(spec, Stdlib):
        return stdlib_files()
    if isinstance(spec, TextFiles) or (isinstance(spec, _Records) and spec.messages is None):
        files, held, _ = both(spec)
        return files + [(f"validation/{name}", path) for name, path in held]
    return None


def stdlib_files(root: Path | None = None) -> Files:
    """Return the library modules of the running interpreter that `Stdlib` includes."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    out_of_scope = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files: Files = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in out_of_scope]  # site-packages may be most of what is there
        here = Path(folder)
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        files += [(prefix + n, here / n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not files:
        raise UserError(
            "data source stdlib",
            expected=f"the .py files of Python's standard library in {root}",
            got="none",
            do=f"This interpreter ({sys.executable}) has no source files: use another one, or TextFiles.",
        )
    return sorted(files)


def both(spec: _Files | Preferences) -> tuple[Files, Files, PassedOver]:
    """Return the files of a source, those that it holds out, and what was found and is not read."""
    kind = type(spec).__name__
    if not spec.paths:
        raise _unnamed(kind, spec)
    passed = PassedOver()
    files = find(spec.paths, f"{kind} paths", passed)
    held = find(spec.validation_paths, f"{kind} validation_paths", passed) if spec.validation_paths else []
    common = {p for _, p in files} & {p for _, p in held}
    if common:
        raise UserError(
            f"{kind} validation_paths",
            expected="files that are not among paths",
            got=min(map(str, common)),
            do="Remove it from one of the two: a training document cannot be held out.",
        )
    return files, held, passed


WANTED = {
    "TextFiles": "text files",
    "Jsonl": "files of JSON lines",
    "Parquet": "Parquet files",
    "Arrow": "Arrow files",
    "ArrayRecords": "ArrayRecord files",
    "Preferences": "files of pairs of chats",
}


def _unnamed(kind: str, spec: _Files | Preferences) -> UserError:
    """Return the error for a spec without paths, whose recipe expects the user to set them."""
    what = WANTED.get(kind, "files of token ids")
    if isinstance(spec, TokenMemmap):
        opens = "" if spec.separator is None else f", every document after the id {spec.separator}"
        what += f" ({spec.dtype}, little-endian, below {spec.vocab}{opens})"
    return UserError(
        f"{kind} paths",
        expected=what,
        got="none: this recipe comes without data",
        do="Give the paths of yours, as in --set data.paths=/data/corpus/*, or choose another source, as in "
        "--set data=Stdlib, and set model.vocab to its vocabulary.",
    )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


class _TextDocuments(Documents):
    """Text files; each file is a document."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver, encode: Encoding) -> None:
        super().__init__(files, held_out, passed)
        self.vocab, self.bos, self._encode = encode.vocab, encode.bos, encode
        self.file = np.arange(len(self.files))
        self.index = np.zeros(len(self.files), np.int64)

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        path = self.files[number][1]
        text = _bytes(path)
        check_text(path, text)
        if isinstance(self._encode, Bytes) and not _is_utf8(text):
            self.passed.add("files that are not UTF-8, of which each byte is a token", self.files[number][0])
        return self._encode(text, str(path)), len(text)
