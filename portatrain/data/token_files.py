"""Files of raw token ids: documents are the runs of ids between two separators."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from portatrain.data.contents import HEAD, LLM_C, LLM_C_BYTES, NPY, check_ids, is_llm_c
from portatrain.data.documents import EMPTY, Documents
from portatrain.data.finding import Files, PassedOver, Place, unreadable
from portatrain.data.spec import TokenMemmap
from portatrain.errors import UserError, choice


class TokenDocuments(Documents):
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
        self._copies = ExitStack()
        try:
            self._ids = [read_ids(on_disk(path, self._copies), dtype, path) for _, path in self.files]
        except BaseException:
            self.close()
            raise
        tables = [_between(f, ids, spec.separator) for f, ids in enumerate(self._ids)]
        for (name, _), ids in zip(self.files, self._ids, strict=True):
            if not len(ids):
                passed.add(EMPTY, name)
        self.file, self.index, self._from, self._to = np.concatenate(tables).T

    def close(self) -> None:
        self._copies.close()

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


def on_disk(place: Place, copies: ExitStack) -> Path:
    """Return the path of a file, or of its copy on disk, which is deleted when ``copies`` is closed."""
    return place if isinstance(place, Path) else copies.enter_context(place.on_disk())


def read_ids(path: Path, dtype: np.dtype, place: Place | None = None) -> np.ndarray:
    """Return the ids of a token file, mapped into memory: raw, one array as numpy.save writes it, or a shard of llm.c.

    The first bytes decide and not the name. Messages call the file ``place``. Raises UserError for a file of something
    else.
    """
    place = path if place is None else place
    try:
        with path.open("rb") as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
        if head.startswith(NPY) or place.suffix == ".npy":
            return _npy_ids(path, dtype, head, place)
        if is_llm_c(head, size):
            return _llm_c_ids(path, dtype, head, size, place)
        check_ids(place, head, size, dtype.itemsize)
        if size % dtype.itemsize == 0:
            return np.memmap(path, dtype, mode="r").view(np.ndarray) if size else np.empty(0, dtype)
    except OSError as error:
        raise unreadable(place, error) from error
    raise UserError(
        f"token file {place}",
        expected=f"a whole number of {dtype.itemsize}-byte ids ({dtype.name})",
        got=f"{size} bytes",
        do="Set dtype to the value with which the file was written, or write the file again.",
    )


def _llm_c_ids(path: Path, dtype: np.dtype, head: bytes, size: int, place: Place) -> np.ndarray:
    magic, _, count = struct.unpack("<3i", head[:12])
    kind = np.dtype(LLM_C[magic]).newbyteorder("<")
    held = (size - LLM_C_BYTES) // kind.itemsize
    if kind != dtype or count != held:
        raise UserError(
            f"token file {place}",
            expected=f"{held} ids of {dtype.name} after the header of llm.c",
            got=f"a header that says {count} ids of {kind.name}",
            do=f"Set dtype to {kind.name!r}." if kind != dtype else "The file was cut or changed: write it again.",
        )
    return (
        np.memmap(path, dtype, mode="r", offset=LLM_C_BYTES, shape=(count,)).view(np.ndarray)
        if count
        else (np.empty(0, dtype))
    )


def _npy_ids(path: Path, dtype: np.dtype, head: bytes, place: Place) -> np.ndarray:
    try:
        if not head.startswith(NPY):  # np.load would open an archive, too
            raise ValueError("a file without the mark of such an array")
        ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise unreadable(place, error) from error
    except Exception as error:  # a malformed header ends in errors of many kinds
        raise UserError(
            f"token file {place}",
            expected="an array that numpy.save wrote",
            got=str(error),
            do="Write it again with numpy.save, or rename it if it holds raw ids.",
        ) from error
    if ids.ndim != 1 or ids.dtype != dtype:
        raise UserError(
            f"token file {place}",
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
