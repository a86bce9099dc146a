"""Reading a pack file whole, and checking every byte of it: header, tiles, padding, table."""

from __future__ import annotations

import numpy as np

from .crc import crc32c, first_mismatch
from .errors import FormatError, MissingFileError
from .manifest import PackRecord
from .packs import PackEntry, SavePack, pack_name
from .store import Store
from .strict_json import RESTORE
from .tiles import Grid

_STEP_BYTES = 2 << 20


def check_length(store: Store, name: str, record: PackRecord, what: str) -> None:
    """Prove that a file is there and has the length that the root says; FormatError names ``what``."""
    size = store.size(name)
    if size is None:
        raise MissingFileError(what, expected=f"a file of {record.length} bytes", got="no such file", do=RESTORE)
    if size != record.length:
        raise FormatError(what, expected=f"{record.length} bytes", got=f"{size}", do=RESTORE)


def verify_pack(store: Store, pack: SavePack, record: PackRecord, *, save: str, writer: int, number: int) -> int:
    """Check every byte of a pack file; returns the bytes of values in it.

    Raises:
        FormatError: the first damage, with the file and, where it lies in a tensor, the tensor.
    """
    name = pack_name(save, writer, number)
    file = store.describe(name)
    tensors = pack.layout.tensors
    check_length(store, name, record, f"{file}, tensor {tensors[pack.entries[0].run.tensor].name!r}")
    header = pack.header(save=save, writer=writer, number=number)
    found = _read(store, name, 0, min(record.data_begin, len(header)))
    if crc32c(header) != record.header_crc or len(header) != record.data_begin:
        raise FormatError(
            f"{file}, header",
            expected=f"crc {crc32c(header):08x} by the layout",
            got=f"{record.header_crc:08x} in the root",
            do=RESTORE,
        )
    if found.tobytes() != header:
        at = next(i for i, (a, b) in enumerate(zip(found.tolist(), header, strict=True)) if a != b)
        raise FormatError(
            f"{file}, header, byte {at} ({_at(pack, header, at)})",
            expected=f"{header[at]:#04x}",
            got=f"{found[at]:#04x}",
            do=RESTORE,
        )
    table = _read(store, name, record.data_begin + pack.table_begin, 4 * pack.tiles)
    if crc32c(table) != record.table_crc:
        raise FormatError(
            f"{file}, crc table", expected=f"crc {record.table_crc:08x}", got=f"{crc32c(table):08x}", do=RESTORE
        )
    crcs, at = table.view("<u4"), 0
    for entry in pack.entries:
        _check_padding(store, name, record, at, entry.begin, file)
        at = entry.begin + entry.nbytes
        tensor = tensors[entry.run.tensor]
        _verify_entry(store, name, record, entry, tensor.item_bytes, crcs, f"{file}, tensor {tensor.name!r}")
    _check_padding(store, name, record, at, pack.table_begin, file)
    return sum(entry.nbytes for entry in pack.entries)


def _verify_entry(
    store: Store, name: str, record: PackRecord, entry: PackEntry, item: int, crcs: np.ndarray, what: str
) -> None:
    grid: Grid = entry.run.grid
    base, whole = grid.elements_before(entry.first), [(0, n) for n in grid.box.shape]
    buffer = np.empty(0, np.uint8)
    for block in grid.blocks(whole, entry.first, entry.stop, max(1, _STEP_BYTES // item)):
        offset = record.data_begin + entry.begin + (grid.elements_before(block.first) - base) * item
        nbytes, size = block.elements * item, block.tile_elements * item
        if len(buffer) < nbytes:
            buffer = np.empty(nbytes, np.uint8)
        data = buffer[:nbytes]
        store.read_into(name, offset, [data.data])
        crc = entry.crc + block.first - entry.first
        bad = first_mismatch(data, size, crcs[crc : crc + block.count].tolist())
        if bad is not None:
            raise FormatError(
                f"{what}, tile {block.first + bad}, bytes {offset + bad * size} to {offset + (bad + 1) * size}",
                expected=f"crc {crcs[crc + bad]:08x}",
                got="another",
                do=RESTORE,
            )


def _check_padding(store: Store, name: str, record: PackRecord, begin: int, end: int, file: str) -> None:
    if end > begin and _read(store, name, record.data_begin + begin, end - begin).any():
        raise FormatError(
            f"{file}, padding, bytes {record.data_begin + begin} to {record.data_begin + end}",
            expected="zeros",
            got="something else",
            do=RESTORE,
        )


def _read(store: Store, name: str, offset: int, nbytes: int) -> np.ndarray:
    data = np.empty(nbytes, np.uint8)
    if nbytes:
        store.read_into(name, offset, [data.data])
    return data


def _at(pack: SavePack, header: bytes, at: int) -> str:
    """Which entry the byte of a header belongs to, for the message."""
    for entry, name in zip(pack.entries, pack.names, strict=True):
        begin = header.find(f'"{name}"'.encode())
        if begin <= at < header.find(b"}", begin):
            return f"tensor {pack.layout.tensors[entry.run.tensor].name!r}"
    return "no tensor's entry"
