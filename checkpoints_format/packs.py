"""Pack files: valid safetensors files whose every byte but the values is known before any is written.

8 bytes       length of the header, little-endian
header        JSON, padded with spaces so that data begins at a multiple of 4 KiB
data          entries without holes: runs of tiles, padding entries, and last ``__crc32c__``,
              the crc of every tile of the pack, in order
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .boxes import Box
from .dtypes import SAFETENSORS
from .errors import FormatError
from .layout import SaveLayout
from .tiles import Grid

FORMAT, VERSION = "portatrain-checkpoint", 1
PAGE = 4096
LINE = 64
MAX_PACK_TILES = 1 << 22  # so that no crc table is over 16 MiB
TABLE = "__crc32c__"


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tiles [first, stop) of a box of tensor number ``tensor``, all by one writer."""

    tensor: int
    grid: Grid
    first: int
    stop: int

    @property
    def box(self) -> Box:
        """The box, in global coordinates."""
        return self.grid.box


@dataclass(frozen=True, slots=True)
class PackEntry:
    """A part of a run, tiles [first, stop), that lies in one pack.

    ``begin``: offset in the pack's data. ``crc``: number of its first tile in the pack's crc table.
    """

    run: Run
    first: int
    stop: int
    begin: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class SavePack:
    """The plan of one pack file."""

    layout: SaveLayout
    entries: tuple[PackEntry, ...]
    table_begin: int

    @property
    def tiles(self) -> int:
        """Number of tiles, which is the number of crcs in the table."""
        return self.entries[-1].crc + self.entries[-1].stop - self.entries[-1].first

    @property
    def data_bytes(self) -> int:
        """Bytes of data, the table included."""
        return self.table_begin + 4 * self.tiles

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The safetensors name of each entry: ``tensor@offset:shape#first-stop``."""
        return tuple(
            f"{self.layout.tensors[e.run.tensor].name}@{_commas(e.run.box.offset)}:{_commas(e.run.box.shape)}"
            f"#{e.first}-{e.stop}"
            for e in self.entries
        )

    def header(self, *, save: str, writer: int, number: int) -> bytes:
        """The first bytes of the file, up to the data: length word and padded JSON."""
        fields: dict[str, object] = {
            "__metadata__": {
                "format": FORMAT,
                "version": str(VERSION),
                "save": save,
                "writer": str(writer),
                "pack": str(number),
            }
        }
        at = pads = 0
        for name, entry in zip(self.names, self.entries, strict=True):
            at, pads = self._pad(fields, at, entry.begin, pads)
            tensor = self.layout.tensors[entry.run.tensor]
            dtype = SAFETENSORS[tensor.dtype]
            width = 1 if dtype == "U8" else tensor.item_bytes
            shape = [entry.nbytes // width]
            if entry.run.grid.count == 1 and width == tensor.item_bytes:
                shape = list(entry.run.box.shape)
            at += entry.nbytes
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [entry.begin, at]}
        self._pad(fields, at, self.table_begin, pads)
        fields[TABLE] = {"dtype": "U32", "shape": [self.tiles], "data_offsets": [self.table_begin, self.data_bytes]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text

    @staticmethod
    def _pad(fields: dict[str, object], at: int, begin: int, pads: int) -> tuple[int, int]:
        if begin > at:  # safetensors refuses holes, so padding has a name
            fields[f"__pad{pads}__"] = {"dtype": "U8", "shape": [begin - at], "data_offsets": [at, begin]}
            pads += 1
        return begin, pads


def _commas(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def fill_packs(layout: SaveLayout, runs: Iterable[Run], limit: int = 1 << 20) -> tuple[SavePack, ...]:
    """Distribute a writer's runs over its packs, in order.

    An entry of a run of at least 4 KiB begins on a page, of a smaller one on 64 bytes. A tile goes into
    the current pack unless that pack holds something already and the tile would end beyond ``pack_bytes``,
    or be one too many.

    Raises:
        FormatError: there would be more packs than ``limit``; stops there.
    """
    packs: list[SavePack] = []
    entries: list[PackEntry] = []
    at = tiles = 0

    def close() -> None:
        nonlocal at, tiles
        if len(packs) >= limit:
            raise FormatError(
                "packs of a writer",
                expected=f"at most {limit}",
                got="more by the layout",
                do="Raise pack_bytes; when reading, the root does not fit its layout: restore another checkpoint.",
            )
        packs.append(SavePack(layout, tuple(entries), at + -at % LINE))
        entries.clear()
        at = tiles = 0

    for run in runs:
        item, grid, k = layout.tensors[run.tensor].item_bytes, run.grid, run.first
        run_bytes = (grid.elements_before(run.stop) - grid.elements_before(run.first)) * item
        align = PAGE if run_bytes >= PAGE else LINE
        while k < run.stop:
            begin = at + -at % align
            before = grid.elements_before(k)
            room = (layout.pack_bytes - begin) // item
            stop = min(run.stop, grid.first_beyond(before + room)) if room > 0 else k
            stop = min(stop, k + MAX_PACK_TILES - tiles)
            if stop <= k:
                if entries:
                    close()
                    continue
                stop = k + 1
            nbytes = (grid.elements_before(stop) - before) * item
            entries.append(PackEntry(run, k, stop, begin, nbytes, tiles))
            at, tiles, k = begin + nbytes, tiles + stop - k, stop
    if entries:
        close()
    return tuple(packs)


def pack_name(save: str, writer: int, number: int) -> str:
    """File name of a pack."""
    return f"pack-{save}-{writer:05d}-{number:04d}.safetensors"


def receipt_name(save: str, writer: int) -> str:
    """File name of a writer's receipt."""
    return f"receipt-{save}-{writer:05d}.json"


def root_name(save: str) -> str:
    """File name of the root manifest."""
    return f"root-{save}.json"
