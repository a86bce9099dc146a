"""Restoring: any box of any tensor, by reading the tiles that it meets and no others."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from .boxes import Box
from .crc import crc32c, first_mismatch
from .dtypes import NUMPY, as_words
from .errors import FormatError, MissingFileError, NotCommittedError
from .layout import SaveLayout
from .manifest import MAX_COMMIT_BYTES, MAX_ROOT_BYTES, Root, decode_commit, decode_root
from .packs import pack_name, root_name
from .read_plan import PackFile, ReadPiece, ReadPlan, ReadRequest, RequestPlanner, Want
from .store import Store, read_small
from .strict_json import RESTORE
from .strided_copy import as_bytes, copy_tiles, part_of, tiles_first
from .verify import check_length, verify_pack
from .writer import COMMIT


class Reader:
    """A committed checkpoint, open for reading. Safe to use from one thread at a time.

    Opening reads COMMIT and the root and proves that the boxes of every tensor cover it exactly; no other
    file is touched until values are asked for.

    Args:
        store: where the checkpoint is.
        budget_bytes: host memory for buffers, beside the arrays returned.
        in_flight: requests to the store at the same time.

    Raises:
        NotCommittedError: no COMMIT. FormatError: damaged, or of a newer format; names the file.
    """

    def __init__(self, store: Store, *, budget_bytes: int = 256 << 20, in_flight: int = 4) -> None:
        self.store = store
        try:
            data = read_small(store, COMMIT, MAX_COMMIT_BYTES)
        except MissingFileError:
            raise NotCommittedError(
                store.describe(COMMIT),
                expected="the file that makes a checkpoint whole",
                got="none",
                do="The save did not finish, or this is another folder.",
            ) from None
        commit = decode_commit(data, store.describe(COMMIT))
        name = root_name(commit.save)
        self.root: Root = decode_root(read_small(store, name, MAX_ROOT_BYTES), commit, store.describe(name))
        self._tables: dict[tuple[int, int], np.ndarray] = {}
        self._in_flight = max(1, in_flight)
        self._requests = RequestPlanner(
            self.root,
            store.describe,
            request_bytes=max(1, min(store.request_bytes, budget_bytes // self._in_flight)),
            gap_bytes=store.merge_gap_bytes,
        )

    @property
    def layout(self) -> SaveLayout:
        """The tensors and who wrote which part of them."""
        return self.root.layout

    @property
    def meta(self) -> Mapping[str, Any]:
        """The JSON object given to ``commit``."""
        return self.root.meta

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in order."""
        return tuple(t.name for t in self.root.layout.tensors)

    def read(self, name: str, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """A box of a tensor (default: all of it), into ``out`` or a new array.

        Raises:
            FormatError: no such tensor or box, or damage, named with its file. ``out`` may then be partly filled.
        """
        return self.read_many([Want(name, box, out)])[0]

    def read_many(self, wants: Iterable[Want]) -> list[np.ndarray]:
        """Several boxes at once, so that their requests overlap in time and neighbours are merged."""
        wants = [self._requests.checked(want) for want in wants]
        requests = self._requests.requests(wants)
        files = dict.fromkeys(request.file for request in requests)
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="ckpt-read") as pool:
            list(pool.map(self._table, files))  # every file is proved whole before a buffer is touched
            results = [want.out if want.out is not None else self._empty(want) for want in wants]
            words = [as_words(result) for result in results]
            scratch: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
            for _ in range(self._in_flight):
                scratch.put(np.empty(0, np.uint8))
            jobs = [pool.submit(self._carry_out, request, words, scratch) for request in requests]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise
        return results

    def plan(self, wants: Iterable[Want]) -> ReadPlan:
        """What ``read_many`` would do. Touches no file."""
        wants = [self._requests.checked(want) for want in wants]
        requests = self._requests.requests(wants)
        files = dict.fromkeys(request.file for request in requests)
        tables = sum(4 * file.pack.tiles for file in files)
        return ReadPlan(
            requests=len(requests),
            files=len(files),
            read_bytes=sum(r.nbytes for r in requests),
            table_bytes=tables,
            wanted_bytes=sum(want.box.size * self.layout.tensor(want.name).item_bytes for want in wants if want.box),
        )

    def verify_all(self, part: int = 0, of: int = 1) -> int:
        """Read every byte of every file and check it; returns the bytes of values found good. Of several processes
        that each check some files, this is number ``part`` of ``of``.

        Raises:
            FormatError: the first damage, with tensor and file.
        """
        found = 0
        for _, good in self._verified(part, of):
            if isinstance(good, FormatError):
                raise good
            found += good
        return found

    def problems(self, read: Callable[[int], None] = lambda nbytes: None) -> Iterator[FormatError]:
        """Like ``verify_all``, but goes on: one error for each damaged file. ``read`` is told the bytes of every file
        that has been read."""
        for nbytes, found in self._verified():
            read(nbytes)
            if isinstance(found, FormatError):
                yield found

    def _verified(self, part: int = 0, of: int = 1) -> Iterator[tuple[int, int | FormatError]]:
        """The length of each file and what checking it comes to, in their order; several at a time."""

        def verify(file: PackFile) -> int | FormatError:
            try:
                return verify_pack(
                    self.store, file.pack, file.record, save=self.root.save, writer=file.writer, number=file.number
                )
            except FormatError as error:
                return error

        files = islice(self._requests.all_files(), part, None, of)
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="ckpt-verify") as pool:
            while some := list(islice(files, 4 * self._in_flight)):  # not all at once: their plans take memory
                yield from zip((file.record.length for file in some), pool.map(verify, some), strict=True)

    def _empty(self, want: Want) -> np.ndarray:
        return np.empty(want.box.shape if want.box else (), NUMPY[self.layout.tensor(want.name).dtype])

    def _table(self, file: PackFile) -> np.ndarray:
        """The crcs of a pack's tiles, proved by the root; also proves the file's length."""
        table = self._tables.get((file.writer, file.number))
        if table is None:
            name = pack_name(self.root.save, file.writer, file.number)
            check_length(self.store, name, file.record, self._requests.what(file))
            table = np.empty(file.pack.tiles, "<u4")
            self.store.read_into(name, file.record.data_begin + file.pack.table_begin, [as_bytes(table).data])
            if crc32c(as_bytes(table)) != file.record.table_crc:
                raise FormatError(
                    f"{self._requests.what(file)}, crc table",
                    expected=f"crc {file.record.table_crc:08x}",
                    got=f"{crc32c(as_bytes(table)):08x}",
                    do=RESTORE,
                )
            self._tables[file.writer, file.number] = table
        return table

    def _carry_out(
        self, request: ReadRequest, results: Sequence[np.ndarray], scratch: queue.SimpleQueue[np.ndarray]
    ) -> None:
        """Read a request's pieces, straight into the result where the bytes lie there in the same order."""
        targets = [tiles_first(part_of(results[p.want], p.target), p.block.tiles) for p in request.pieces]
        direct = [t.flags.c_contiguous and t.nbytes == p.nbytes for t, p in zip(targets, request.pieces, strict=True)]
        buffer = scratch.get()
        try:
            needed = request.nbytes - sum(p.nbytes for p, d in zip(request.pieces, direct, strict=True) if d)
            if len(buffer) < needed:
                buffer = np.empty(needed, np.uint8)
            used, at = 0, request.pieces[0].offset
            rows: list[np.ndarray] = []
            views: list[memoryview] = []
            for piece, target, straight in zip(request.pieces, targets, direct, strict=True):
                if gap := piece.offset - at:
                    views.append(buffer[used : used + gap].data)
                    used += gap
                rows.append(as_bytes(target) if straight else buffer[used : used + piece.nbytes])
                used += 0 if straight else piece.nbytes
                views.append(rows[-1].data)
                at = piece.offset + piece.nbytes
            name = pack_name(self.root.save, request.file.writer, request.file.number)
            self.store.read_into(name, request.pieces[0].offset, views)
            for piece, target, row, straight in zip(request.pieces, targets, rows, direct, strict=True):
                self._check(request.file, piece, row)
                if not straight:
                    shape = (*piece.block.tiles, *piece.block.extents)
                    tiles = row.view(target.dtype).reshape(shape)
                    copy_tiles(target, tiles[(slice(None),) * len(piece.block.tiles) + _inside_tile(piece)])
        finally:
            scratch.put(buffer)

    def _check(self, file: PackFile, piece: ReadPiece, row: np.ndarray) -> None:
        table, block = self._table(file), piece.block
        size = block.tile_elements * piece.tensor.item_bytes
        bad = first_mismatch(row, size, table[piece.crc : piece.crc + block.count].tolist())
        if bad is not None:
            begin = piece.offset + bad * size
            raise FormatError(
                f"{self._requests.what(file, piece.tensor)}, tile {block.first + bad}, bytes {begin} to {begin + size}",
                expected=f"crc {table[piece.crc + bad]:08x}",
                got="another",
                do=RESTORE,
            )


def _inside_tile(piece: ReadPiece) -> tuple[slice, ...]:
    """The wanted part of each tile; only along dimensions with one tile is it less than all."""
    return tuple(part if m == 1 else slice(None) for part, m in zip(piece.inside, piece.block.tiles, strict=True))
