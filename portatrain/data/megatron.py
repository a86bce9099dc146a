"""Token files of Megatron-LM: PREFIX.bin has the ids, PREFIX.idx says where sequences and documents begin.

The index (megatron/core/datasets/indexed_dataset.py, class _IndexReader), all little-endian: the mark
"MMIDIDX\\0\\0", the version 1 (uint64), the type of the ids (uint8), the numbers of sequences and of document bounds
(uint64 each); then the length of each sequence in ids (int32), its offset in bytes (int64), and the bounds of the
documents in sequences (int64). A multimodal index has the mode of each sequence (int8) at the end, which is refused.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from portatrain.data.documents import EMPTY, Documents
from portatrain.data.finding import Files, PassedOver, Place, unreadable
from portatrain.data.spec import Megatron
from portatrain.data.token_files import on_disk
from portatrain.errors import UserError

MARK, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""The types of ids by their codes; 6 and 7 are floats."""
HEAD_BYTES = len(MARK) + 8 + 1 + 8 + 8


class MegatronDocuments(Documents):
    """The documents of .bin files with their indices."""

    def __init__(self, files: Files, held_out: Files, passed: PassedOver, spec: Megatron) -> None:
        files, held_out = _pairs(files), _pairs(held_out)
        super().__init__(files, held_out, passed)
        if spec.separator is not None and not 0 <= spec.separator < spec.vocab:
            raise UserError(
                "Megatron separator",
                expected=f"an id from 0 to {spec.vocab - 1}, vocab being {spec.vocab}",
                got=str(spec.separator),
                do="Set it to the id that ends the documents in the files, or to None.",
            )
        self.vocab, self.bos, self._separator = spec.vocab, spec.separator or 0, spec.separator
        self._copies = ExitStack()
        try:
            self._ids: list[np.ndarray] = []
            tables = [self._open(f, name, place) for f, (name, place) in enumerate(self.files)]
        except BaseException:
            self.close()
            raise
        self.file, self.index, self._from, self._to = np.concatenate(tables).T

    def close(self) -> None:
        self._copies.close()

    def _open(self, f: int, name: str, place: Place) -> np.ndarray:
        """Map the ids of a file; return (documents, 4) int64: file, index in it, first id, one past the last id."""
        index = beside(place, ".idx")
        try:
            dtype, bounds = read_index(on_disk(index, self._copies).read_bytes(), index)
            path = on_disk(place, self._copies)
            size = path.stat().st_size
            if size != bounds[-1] * dtype.itemsize:
                raise UserError(
                    f"token file {place}",
                    expected=f"{int(bounds[-1])} ids of {dtype.name}, as {index} says",
                    got=f"{size} bytes",
                    do="The file was cut, or belongs to another index: write both again.",
                )
            self._ids.append(np.memmap(path, dtype, mode="r").view(np.ndarray) if size else np.empty(0, dtype))
        except OSError as error:
            raise unreadable(place, error) from error
        if len(bounds) == 1:
            self.passed.add(EMPTY, name)
        low, high = bounds[:-1], bounds[1:]
        return np.stack((np.full(len(low), f), np.arange(len(low)), low, high), axis=1)

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
                do="Set vocab to the size of the tokenizer with which the file was written.",
            )
        if self._separator is not None and len(ids) and ids[-1] == self._separator:
            ids = ids[:-1]
        return ids.astype(np.min_scalar_type(self.vocab - 1)), None


def read_index(data: bytes, place: Place) -> tuple[np.dtype, np.ndarray]:
    """Return the type of the ids and the bounds of the documents in ids, (documents + 1,) int64, from 0 on.

    Raises UserError for what is not such an index, or has sequences that do not follow each other.
    """

    def wrong(got: str) -> UserError:
        return UserError(
            f"index {place}",
            expected="an index of Megatron-LM, version 1, with one sequence after another",
            got=got,
            do="Write it again with Megatron's preprocess_data.py.",
        )

    if not data.startswith(MARK) or len(data) < HEAD_BYTES:
        raise wrong("a file without its mark" if not data.startswith(MARK) else f"only {len(data)} bytes")
    version, code, sequences, count = struct.unpack_from("<QBQQ", data, len(MARK))
    if version != VERSION or code not in DTYPES:
        raise wrong(f"version {version}" if version != VERSION else f"ids of type {code}, which is no type of integers")
    need = HEAD_BYTES + 12 * sequences + 8 * count
    if len(data) != need:
        modes = len(data) == need + sequences
        raise wrong("a multimodal index" if modes else f"{len(data)} bytes in place of {need}")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    lengths = np.frombuffer(data, "<i4", sequences, HEAD_BYTES).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, HEAD_BYTES + 4 * sequences)
    documents = np.frombuffer(data, "<i8", count, HEAD_BYTES + 12 * sequences)
    begins = np.concatenate(([0], np.cumsum(lengths)))
    if (lengths < 0).any() or (offsets != begins[:-1] * dtype.itemsize).any():
        raise wrong("sequences that overlap or leave gaps")
    if not count or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise wrong("bounds of documents that are not increasing, or not from the first sequence to the last")
    return dtype, begins[documents]


def beside(place: Place, suffix: str) -> Place:
    """Return the file of the same name with another suffix."""
    return place.with_suffix(suffix) if isinstance(place, Path) else place.beside(suffix)


def _pairs(files: Files) -> Files:
    """Return the .bin files of what was found, each once. Raises UserError for one without its index."""
    found = {}
    for name, place in files:
        if place.suffix not in (".bin", ".idx"):
            raise UserError(
                f"data file {place}",
                expected="files of Megatron-LM, with the endings .bin and .idx",
                got=f"a name that ends with {place.suffix!r}",
                do="Leave it out, as with a glob *.idx.",
            )
        ids, index = beside(place, ".bin"), beside(place, ".idx")
        for one in (ids, index):
            if not one.exists():
                raise UserError(
                    f"data file {place}",
                    expected=f"{one} beside it",
                    got="no such file",
                    do="Copy both files of the pair. Ids without an index are read with TokenMemmap.",
                )
        found[ids] = name.removesuffix(place.suffix)
    return [(name, place) for place, name in found.items()]
