"""The documents of text and token sources, in a fixed order, read one at a time by number.

The name of a document is the name of its file within the source and its index in the file. Names and order do not
depend on the location of the source, so a corpus can be moved.
"""

from __future__ import annotations

import os
import struct
import sys
import sysconfig
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from portatrain.data.contents import HEAD, LLM_C, LLM_C_BYTES, NPY, check_ids, check_text, is_llm_c
from portatrain.data.encode import Bytes, Deferred, Encoding, Tokenized, encoding
from portatrain.data.finding import Files, PassedOver, find, unreadable
from portatrain.data.spec import DataSpec, Jsonl, Stdlib, TextFiles, TokenMemmap
from portatrain.errors import UserError, choice
from portatrain.model import rng
from portatrain.system import json_files


class Documents(ABC):
    """Documents [0, n) of one source.

    Attributes:
        vocab: number of token ids. bos: the id that begins every document in the packed stream.
        file: (n,) int64, not decreasing, the file of each document. index: (n,) int64, its index in that file.
        passed: what the source holds and does not read.
    """

    vocab: int
    bos: int
    file: np.ndarray
    index: np.ndarray
    _encode: Encoding
    """The encoding of a source of text; a source of ids has none."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver | None = None) -> None:
        self.passed = PassedOver() if passed is None else passed
        self.files = files + held_out
        self._trained = len(files)

    def __len__(self) -> int:
        return len(self.file)

    @abstractmethod
    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        """Return the token ids of a document without ``bos``, and the number of its source bytes (None: unknown)."""

    def defer(self) -> Deferred | None:
        """Let `read` return the bytes of a document instead of its ids, and return the encoding that was put off.

        Return None, and change nothing, if the documents are not encoded by a tokenizer.
        """
        real = getattr(self, "_encode", None)
        if not isinstance(real, Tokenized):
            return None
        later = self._encode = Deferred(real)
        return later

    def close(self) -> None:  # noqa: B027  # most sources hold nothing open
        """Close what the source holds open; it is not read any more."""

    def held_out(self, fraction: float) -> np.ndarray:
        """Return (n,) bool, True for the documents of the validation split.

        If files are held out by name, their documents are in it. Otherwise a document is in it if the Philox word at
        its index, under a key from its file's name, is below ``fraction``. Adding documents therefore never moves
        another document to the other split; but if no word of a small corpus is below it, the lowest one counts.
        """
        if self._trained < len(self.files):
            return self.file >= self._trained
        drawn = np.ones(len(self))
        for f, (name, _) in enumerate(self.files):
            here = slice(*np.searchsorted(self.file, (f, f + 1)))
            index = self.index[here]
            if len(index):
                words = rng.words(0, f"data/split/{name}", 0, int(index[-1]) + 1)[index]
                drawn[here] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        held = drawn < fraction
        if fraction and len(self) > 1 and not held.any():
            held[drawn.argmin()] = True
        return held


def documents(spec: DataSpec) -> Documents:
    """Return the documents of a token source."""
    if isinstance(spec, Stdlib):
        return _TextDocuments(stdlib_files(), [], PassedOver(), encoding(spec.tokenizer, spec.bos))
    if isinstance(spec, TextFiles):
        return _TextDocuments(*_both(spec), encoding(spec.tokenizer, spec.bos))
    if isinstance(spec, Jsonl):
        return _JsonlDocuments(*_both(spec), encoding(spec.tokenizer, spec.bos), spec.field)
    if isinstance(spec, TokenMemmap):
        return _TokenDocuments(*_both(spec), spec)
    raise TypeError(f"{type(spec).__name__} is not a source of tokens")


def stdlib_files(root: Path | None = None) -> Files:
    """Return the library modules of the running interpreter that `Stdlib` includes."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    out_of_scope = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not (out_of_scope.intersection(path.relative_to(root).parts) or path.name.startswith("_sysconfigdata"))
    ]
    if not files:
        raise UserError(
            "data source stdlib",
            expected=f"the .py files of Python's standard library in {root}",
            got="none",
            do=f"This interpreter ({sys.executable}) has no source files: use another one, or TextFiles.",
        )
    return sorted(files)


def _both(spec: TextFiles | Jsonl | TokenMemmap) -> tuple[Files, Files, PassedOver]:
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
            got=str(min(common)),
            do="Remove it from one of the two: a training document cannot be held out.",
        )
    return files, held, passed


def _unnamed(kind: str, spec: TextFiles | Jsonl | TokenMemmap) -> UserError:
    """Return the error for a spec without paths, whose recipe expects the user to set them."""
    what = {"TextFiles": "text files", "Jsonl": "files of JSON lines"}.get(kind, "files of token ids")
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


EMPTY = "empty files"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes(path: Path) -> bytes:
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


class _JsonlDocuments(Documents):
    """JSON lines; each line is a document. One pass over the files finds the beginnings of the lines."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver, encode: Encoding, field: str) -> None:
        super().__init__(files, held_out, passed)
        self.vocab, self.bos, self._encode, self._field = encode.vocab, encode.bos, encode, field
        rows = array("q")
        for f, (name, path) in enumerate(self.files):
            before = len(rows)
            for line, at in _lines(path):
                rows.extend((f, line, at))
            if len(rows) == before:
                passed.add(EMPTY, name)
        self.file, self.index, self._at = np.array(rows, np.int64).reshape(-1, 3).T

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        path, line = self.files[int(self.file[number])][1], int(self.index[number]) + 1
        try:
            with path.open("rb") as file:
                file.seek(int(self._at[number]))
                raw = file.readline()
        except OSError as error:
            raise unreadable(path, error) from error
        where = f"{path}, line {line}"
        try:
            value = json_files.loads(raw)
        except ValueError as error:
            raise UserError(
                where, expected="one JSON object", got=str(error), do="Correct or delete the line."
            ) from error
        if not isinstance(value, dict):
            raise UserError(
                where, expected="one JSON object", got=type(value).__name__, do="Correct or delete the line."
            )
        if self._field not in value:
            raise choice(f"{where}, field", self._field, map(str, value))
        text = value[self._field]
        if not isinstance(text, str):
            raise UserError(
                f"{where}, field {self._field!r}", expected="a string", got=type(text).__name__, do="Correct the line."
            )
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}, field {self._field!r}",
                expected="text that UTF-8 can encode",
                got=str(error),
                do="Correct the escapes of the line: a lone surrogate is not a character.",
            ) from error
        return self._encode(data, where), len(data)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (line number from 0, offset in bytes) for every line that is not blank."""
    try:
        with path.open("rb") as file:
            check_text(path, file.read(HEAD), os.fstat(file.fileno()).st_size)
            at = file.seek(0)
            for line, raw in enumerate(file):
                if raw.strip():
                    yield line, at
                at += len(raw)
    except OSError as error:
        raise unreadable(path, error) from error


class _TokenDocuments(Documents):
    """Token files; each run of tokens between two separators is a document, or each file if there is no separator."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver, spec: TokenMemmap) -> None:
        super().__init__(files, held_out, passed)
        kinds = ("uint8", "uint16", "uint32", "int32", "int64", "uint64")
        if spec.dtype not in kinds:
            raise choice("TokenMemmap dtype", spec.dtype, kinds)
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        for what, value, least, most in (
            ("vocab", spec.vocab, 1, min(int(np.iinfo(dtype).max) + 1, 2**31)),
            ("separator", spec.separator, 0, spec.vocab - 1),
        ):
            if value is not None and not least <= value <= most:
                raise UserError(
                    f"TokenMemmap {what}",
                    expected=f"from {least} to {most} for ids of {spec.dtype} below vocab={spec.vocab}",
                    got=str(value),
                    do=f"Set {what} to the value with which the files were written.",
                )
        self.vocab, self.bos = spec.vocab, spec.separator or 0
        self._ids = [read_ids(path, dtype) for _, path in self.files]
        tables = [_between(f, ids, spec.separator) for f, ids in enumerate(self._ids)]
        for (name, _), ids in zip(self.files, self._ids, strict=True):
            if not len(ids):
                passed.add(EMPTY, name)
        self.file, self.index, self._from, self._to = np.concatenate(tables).T

    def read(self, number: int) -> tuple[np.ndarray, int | None]:
        f, low, high = int(self.file[number]), int(self._from[number]), int(self._to[number])
        ids = self._ids[f][low:high]
        bad = (ids < 0) | (ids >= self.vocab)
        if bad.any():
            at = int(bad.argmax())
            raise UserError(
                f"token {low + at} of {self.files[f][1]}",
                expected=f"an id from 0 to {self.vocab - 1}, vocab being {self.vocab}",
                got=str(int(ids[at])),
                do="Set vocab and dtype to the values with which the file was written.",
            )
        return ids.astype(np.min_scalar_type(self.vocab - 1)), None


def read_ids(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return the ids of a token file, mapped into memory: raw, one array as numpy.save writes it, or a shard of llm.c.

    The first bytes decide and not the name. Raises UserError for a file of something else.
    """
    try:
        with path.open("rb") as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
        if head.startswith(NPY) or path.suffix == ".npy":
            return _npy_ids(path, dtype, head)
        if is_llm_c(head, size):
            return _llm_c_ids(path, dtype, head, size)
        check_ids(path, head, size, dtype.itemsize)
        if size % dtype.itemsize == 0:
            return np.memmap(path, dtype, mode="r").view(np.ndarray) if size else np.empty(0, dtype)
    except OSError as error:
        raise unreadable(path, error) from error
    raise UserError(
        f"token file {path}",
        expected=f"a whole number of {dtype.itemsize}-byte ids ({dtype.name})",
        got=f"{size} bytes",
        do="Set dtype to the value with which the file was written, or write the file again.",
    )


def _llm_c_ids(path: Path, dtype: np.dtype, head: bytes, size: int) -> np.ndarray:
    magic, _, count = struct.unpack("<3i", head[:12])
    kind = np.dtype(LLM_C[magic]).newbyteorder("<")
    held = (size - LLM_C_BYTES) // kind.itemsize
    if kind != dtype or count != held:
        raise UserError(
            f"token file {path}",
            expected=f"{held} ids of {dtype.name} after the header of llm.c",
            got=f"a header that says {count} ids of {kind.name}",
            do=f"Set dtype to {kind.name!r}." if kind != dtype else "The file was cut or changed: write it again.",
        )
    return (
        np.memmap(path, dtype, mode="r", offset=LLM_C_BYTES, shape=(count,)).view(np.ndarray)
        if count
        else (np.empty(0, dtype))
    )


def _npy_ids(path: Path, dtype: np.dtype, head: bytes) -> np.ndarray:
    try:
        if not head.startswith(NPY):  # np.load would open an archive, too
            raise ValueError("a file without the mark of such an array")
        ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a malformed header ends in errors of many kinds
        raise UserError(
            f"token file {path}",
            expected="an array that numpy.save wrote",
            got=str(error),
            do="Write it again with numpy.save, or rename it if it holds raw ids.",
        ) from error
    if ids.ndim != 1 or ids.dtype != dtype:
        raise UserError(
            f"token file {path}",
            expected=f"a one-dimensional array of {dtype.name}, little-endian",
            got=f"{ids.dtype.name} of shape {ids.shape}",
            do="Set dtype to the dtype of the file; flatten an array of several dimensions.",
        )
    return ids.view(np.ndarray)


def _between(file: int, ids: np.ndarray, separator: int | None) -> np.ndarray:
    """Return (documents, 4) int64: file, index in the file, first token, one past the last token."""
    cut = np.empty(0, np.int64)
    if separator is not None:
        step = 1 << 26  # limits the memory of the mask; the corpus may not fit in memory

        parts = (np.flatnonzero(ids[at : at + step] == separator) + at for at in range(0, len(ids), step))
        cut = np.concatenate([cut, *parts])
    low, high = np.append(-1, cut) + 1, np.append(cut, len(ids))
    kept = high > low
    low, high = low[kept], high[kept]
    return np.stack((np.full(len(low), file), np.arange(len(low)), low, high), axis=1)
