"""Which bytes of which files a read needs: from the root alone, before any of them is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .boxes import Box
from .dtypes import NUMPY
from .errors import FormatError, shorten
from .layout import Tensor
from .manifest import PackRecord, Root
from .packs import SavePack, pack_name, root_name
from .strict_json import RESTORE
from .tiles import Block
from .write_plan import Planner, WriterPlan


@dataclass(frozen=True)
class Want:
    """A box of a tensor, and the array of its shape and dtype to fill (None: a new one)."""

    name: str
    box: Box | None = None
    out: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ReadPiece:
    """A block of tiles to read: where it lies in the file, and which part of it goes where.

    ``inside``: the wanted part, relative to the block. ``target``: the same part in the wanted box's array.
    """

    want: int
    tensor: Tensor
    block: Block
    offset: int
    nbytes: int
    crc: int
    inside: tuple[slice, ...]
    target: tuple[slice, ...]

    @property
    def elements(self) -> int:
        """Wanted elements."""
        return math.prod(s.stop - s.start for s in self.target)


@dataclass(frozen=True, slots=True, eq=False)
class PackFile:
    """A pack that is to be read. One object a file, equal to itself alone: by value a hash would walk the layout."""

    writer: int
    number: int
    pack: SavePack
    record: PackRecord


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Pieces of one file that are read together, ascending, with the gaps between them."""

    file: PackFile
    pieces: tuple[ReadPiece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes asked for."""
        return self.pieces[-1].offset + self.pieces[-1].nbytes - self.pieces[0].offset


@dataclass(frozen=True)
class ReadPlan:
    """What a read will do: requests for values to the store, their bytes with merged gaps, bytes of crc tables
    (one more request a file), and bytes wanted."""

    requests: int
    files: int
    read_bytes: int
    table_bytes: int
    wanted_bytes: int


class RequestPlanner:
    """Turns wants into requests.

    Args:
        describe: what to call a file in a message.
        request_bytes: of one request, at most (or one tile).
        gap_bytes: gaps up to this are read too.
    """

    def __init__(self, root: Root, describe: Callable[[str], str], *, request_bytes: int, gap_bytes: int) -> None:
        self.root, self._describe = root, describe
        self._request_bytes, self._gap_bytes = request_bytes, gap_bytes
        self._planner = Planner(root.layout, [len(records) for records in root.packs])
        self._files: dict[tuple[int, int], PackFile] = {}

    def checked(self, want: Want) -> Want:
        """The want with its box filled in; an error if the checkpoint cannot serve it."""
        tensor = self.root.layout.tensor(want.name)
        what, whole = f"tensor {want.name!r}", Box.whole(tensor.shape)
        box = want.box if want.box is not None else whole
        if (
            len(box.offset) != len(tensor.shape)
            or len(box.shape) != len(tensor.shape)
            or any(
                o < 0 or n < 0 or o + n > size for o, n, size in zip(box.offset, box.shape, tensor.shape, strict=True)
            )
        ):
            raise FormatError(
                what,
                expected=f"a box inside {list(tensor.shape)}",
                got=shorten(str(box)),
                do="Ask for a part of the tensor.",
            )
        out = want.out
        if out is not None and (out.shape != box.shape or out.dtype != NUMPY[tensor.dtype] or not out.flags.writeable):
            raise FormatError(
                what,
                expected=f"a writeable {tensor.dtype} array of shape {list(box.shape)} to fill",
                got=f"{out.dtype} {list(out.shape)}",
                do="Pass such an array, or none.",
            )
        return Want(want.name, box, out)

    def requests(self, wants: Sequence[Want]) -> list[ReadRequest]:
        """The pieces of all wants, sorted by file and offset, near ones merged."""
        pieces: dict[tuple[int, int], list[ReadPiece]] = {}
        for number, want in enumerate(wants):
            for key, piece in self._pieces(number, want):
                pieces.setdefault(key, []).append(piece)
        requests = []
        for key in sorted(pieces):
            batch: list[ReadPiece] = []
            file, end = self.file(*key), 0
            for piece in sorted(pieces[key], key=lambda piece: piece.offset):
                fits = batch and piece.offset + piece.nbytes - batch[0].offset <= self._request_bytes
                if batch and not (fits and 0 <= piece.offset - end <= self._gap_bytes):
                    requests.append(ReadRequest(file, tuple(batch)))
                    batch = []
                batch.append(piece)
                end = piece.offset + piece.nbytes
            requests.append(ReadRequest(file, tuple(batch)))
        return requests

    def _pieces(self, number: int, want: Want) -> Iterator[tuple[tuple[int, int], ReadPiece]]:
        """The pieces of a want; together they are exactly the wanted box, or an error."""
        box = want.box
        if box is None or box.size == 0:
            return
        index = self.root.layout.index(want.name)
        tensor, found = self.root.layout.tensors[index], 0
        limit = max(1, self._request_bytes // tensor.item_bytes)
        for source, writers in self._planner.sources(index, box):
            common = source.intersect(box)
            if common is None:
                continue
            crop = [(s.start, s.stop) for s in common.slices(source.offset)]
            for writer in writers:
                for pack, entry in self._plan(writer).entries.get((index, source.offset), ()):
                    begin = self.file(writer, pack).record.data_begin + entry.begin
                    grid = entry.run.grid
                    base = grid.elements_before(entry.first)
                    for block in grid.blocks(crop, entry.first, entry.stop, limit):
                        area = Box(tuple(o + s for o, s in zip(source.offset, block.start, strict=True)), block.shape)
                        part = area.intersect(box)
                        if part is None:
                            continue
                        piece = ReadPiece(
                            number,
                            tensor,
                            block,
                            begin + (grid.elements_before(block.first) - base) * tensor.item_bytes,
                            block.elements * tensor.item_bytes,
                            entry.crc + block.first - entry.first,
                            part.slices(area.offset),
                            part.slices(box.offset),
                        )
                        found += piece.elements
                        yield (writer, pack), piece
        if found != box.size:
            raise FormatError(
                f"tensor {want.name!r}",
                expected=f"{box.size} elements in {box}",
                got=f"{found}",
                do="This is a defect of the reader: report it.",
            )

    def file(self, writer: int, number: int) -> PackFile:
        """A pack of the checkpoint; an error if root and layout disagree about it."""
        file = self._files.get((writer, number))
        if file is None:
            plan, records = self._plan(writer), self.root.packs[writer]
            what = self._describe(pack_name(self.root.save, writer, number))
            self._check_count(writer, len(plan.packs))
            pack, record = plan.packs[number], records[number]
            if record.length != record.data_begin + pack.data_bytes:
                raise FormatError(
                    what,
                    expected=f"{record.data_begin + pack.data_bytes} bytes by the layout",
                    got=f"{record.length} in the root",
                    do=RESTORE,
                )
            file = self._files[writer, number] = PackFile(writer, number, pack, record)
        return file

    def what(self, file: PackFile, tensor: Tensor | None = None) -> str:
        """File and tensor, for a message; by default the file's first tensor."""
        tensor = tensor or self.root.layout.tensors[file.pack.entries[0].run.tensor]
        return f"{self._describe(pack_name(self.root.save, file.writer, file.number))}, tensor {tensor.name!r}"

    def all_files(self) -> Iterator[PackFile]:
        """Every pack of the checkpoint; an error if the root has other packs than the layout."""
        for writer in range(self.root.layout.writers):
            planned = self._plan(writer).packs
            self._check_count(writer, len(planned))
            yield from (self.file(writer, number) for number in range(len(planned)))

    def _plan(self, writer: int) -> WriterPlan:
        try:
            return self._planner.writer(writer)
        except FormatError as error:
            raise error.inside(self._describe(root_name(self.root.save))) from None

    def _check_count(self, writer: int, planned: int) -> None:
        found = len(self.root.packs[writer])
        if found != planned:
            raise FormatError(
                self._describe(root_name(self.root.save)),
                expected=f"{planned} packs of writer {writer}, by the layout",
                got=f"{found}",
                do=RESTORE,
            )
