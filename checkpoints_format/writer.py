"""Write tensors as the bytes of pack files: each process writes its own packs and a receipt (`Writer`), then one of
them commits (`commit`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .boxes import Box
from .crc import crc32c, crc32c_each
from .dtypes import as_words, dtype_name, little_endian
from .errors import AlreadyCommittedError, FormatError, MissingFileError, shorten
from .layout import SaveLayout, Tensor
from .manifest import (
    MAX_RECEIPT_BYTES,
    PackRecord,
    Receipt,
    Root,
    check_save,
    decode_receipt,
    encode_commit,
    encode_receipt,
    encode_root,
    layout_digest,
)
from .packs import PackEntry, SavePack, pack_name, receipt_name, root_name
from .slabs import Slabs
from .store import Store, read_small
from .strided_copy import copy_tiles, part_of, tiles_first
from .write_plan import Planner

COMMIT = "COMMIT"
_SLAB_BYTES = 4 << 20  # or one tile
_SLABS = 2  # one at the disk, one being filled: see _one_ahead

#: Where a tensor's values come from: one array for the writer's only box of it; several (box, array);
#: or a function from a box inside what this writer holds, in global coordinates, to an array of its shape.
Source = np.ndarray | Sequence[tuple[Box, np.ndarray]] | Callable[[Box], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Written:
    """The result of a writer: number of pack files, bytes of values, bytes of files."""

    packs: int
    value_bytes: int
    file_bytes: int


class Writer:
    """Writes one process's part of a checkpoint.

    Args:
        store: the store for the checkpoint's files.
        layout: the layout, the same on every process.
        save: a name that is the same on every process, and that no other save into this store has.
        writer: the number of this process among the writers.
        budget_bytes: maximum host memory for buffers and for arrays that are fetched lazily; at least 4 tiles.
        streams: number of pack files that are written at the same time.

    Raises:
        FormatError: an invalid number or name, or a budget that is too small.
    """

    def __init__(
        self,
        store: Store,
        layout: SaveLayout,
        *,
        save: str,
        writer: int = 0,
        budget_bytes: int = 256 << 20,
        streams: int = 1,
    ) -> None:
        if not 0 <= writer < layout.writers:
            raise FormatError(
                "writer",
                expected=f"a number from 0 to {layout.writers - 1}",
                got=shorten(writer),
                do="Number the processes from 0.",
            )
        self.store, self.layout, self.save, self.number = store, layout, check_save(save), writer
        self.plan = Planner(layout).writer(writer)
        self._streams = max(1, streams)
        largest = max((int(np.prod(t.tile or ())) * t.item_bytes for t in layout.tensors), default=1)
        half = budget_bytes // (2 * self._streams)  # one half for fetched arrays, one for slabs
        if half < _SLABS * largest:
            raise FormatError(
                "host memory budget",
                got=f"{budget_bytes}",
                do="Raise the budget or use fewer streams.",
                expected=f"at least {2 * _SLABS * largest * self._streams} bytes for {self._streams} "
                f"stream(s) of tiles up to {largest} bytes",
            )
        self._fetch_bytes, self._slab_bytes = half, max(largest, min(_SLAB_BYTES, half // _SLABS))

    def write(self, sources: Mapping[str, Source], *, note: Callable[[], Mapping[str, Any]] | None = None) -> Written:
        """Write all packs of this process, then its receipt. The packs are on stable storage when it returns.

        Args:
            sources: tensor name -> its values; see `Source`.
            note: called after the packs are written; its JSON object goes into the receipt, for `commit`.

        Raises:
            FormatError: a tensor is missing or has another shape or dtype, or the store fails. Checkpoints that were
                committed before stay valid.
        """
        held = sorted({entry.run.tensor for pack in self.plan.packs for entry in pack.entries})
        for index in held:
            _check_source(self.layout.tensors[index], sources)
        with ThreadPoolExecutor(self._streams, thread_name_prefix="ckpt-stream") as pool:
            jobs = [pool.submit(self._write_pack, number, pack, sources) for number, pack in enumerate(self.plan.packs)]
            try:
                records = [job.result() for job in jobs]
            except BaseException:
                for job in jobs:
                    job.cancel()
                raise
        receipt = Receipt(
            save=self.save,
            writer=self.number,
            layout=layout_digest(self.layout),
            packs=tuple(records),
            note=note() if note is not None else {},
        )
        data = encode_receipt(receipt)
        # Only the committing process reads it, after the barrier; if the machine fails before, the save is void anyway.

        self.store.put(receipt_name(self.save, self.number), [memoryview(data)], len(data), durable=False)
        return Written(packs=len(records), value_bytes=self.plan.nbytes, file_bytes=sum(r.length for r in records))

    def _write_pack(self, number: int, pack: SavePack, sources: Mapping[str, Source]) -> PackRecord:
        header = pack.header(save=self.save, writer=self.number, number=number)
        crcs = np.zeros(pack.tiles, "<u4")
        length = len(header) + pack.data_bytes

        def chunks() -> Generator[memoryview, None, None]:
            slabs = Slabs(min(self._slab_bytes, length))
            yield from slabs.copy(np.frombuffer(header, np.uint8))
            yield from self._values(pack, sources, crcs, slabs)
            yield from slabs.copy(crcs.view(np.uint8))
            if last := slabs.rest():
                yield last

        ready = chunks() if length <= self._slab_bytes else _one_ahead(chunks())
        # Close the generator here if the store fails half-way. If it were collected later, in a thread of its own pool,
        # it would wait for that same thread.
        with contextlib.closing(ready):
            self.store.put(pack_name(self.save, self.number, number), ready, length)
        return PackRecord(length, len(header), crc32c(header), crc32c(crcs.view(np.uint8)))

    def _values(
        self, pack: SavePack, sources: Mapping[str, Source], crcs: np.ndarray, slabs: Slabs
    ) -> Iterator[memoryview]:
        """Yield the data of a pack up to its crc table, through ``slabs``; fill in ``crcs``."""
        at = 0
        for entry in pack.entries:
            yield from slabs.copy(np.zeros(entry.begin - at, np.uint8))
            at, crc = entry.begin + entry.nbytes, entry.crc
            tensor, grid = self.layout.tensors[entry.run.tensor], entry.run.grid
            item, whole = tensor.item_bytes, [(0, n) for n in entry.run.box.shape]
            for part in self._parts(tensor, entry, sources[tensor.name]):
                for block in grid.blocks(whole, part.first, part.stop, self._slab_bytes // item):
                    where = Box(block.start, block.shape).slices(part.start)
                    tiles = tiles_first(part_of(part.words, where), block.tiles)
                    nbytes = block.elements * item
                    yield from slabs.room(nbytes)
                    data = slabs.take(nbytes)
                    copy_tiles(data.view(tiles.dtype).reshape(tiles.shape), tiles)
                    crcs[crc : crc + block.count] = crc32c_each(data, block.tile_elements * item)
                    crc += block.count
        yield from slabs.copy(np.zeros(pack.table_begin - at, np.uint8))

    def _parts(self, tensor: Tensor, entry: PackEntry, source: Source) -> Iterator[_ArrayPart]:
        """Yield the values of an entry: all at once from an array, or in pieces within the budget from a function."""
        box = entry.run.box
        if not callable(source):
            yield _ArrayPart(
                _words(tensor, box, _find(tensor, box, source)), (0,) * len(box.shape), entry.first, entry.stop
            )
            return
        whole = [(0, n) for n in box.shape]
        for block in entry.run.grid.blocks(whole, entry.first, entry.stop, self._fetch_bytes // tensor.item_bytes):
            part = Box(tuple(o + s for o, s in zip(box.offset, block.start, strict=True)), block.shape)
            yield _ArrayPart(_words(tensor, part, source(part)), block.start, block.first, block.first + block.count)


@dataclass(frozen=True, slots=True)
class _ArrayPart:
    """Values as unsigned words from ``start`` of the box on; of them tiles [first, stop) are to be written."""

    words: np.ndarray
    start: tuple[int, ...]
    first: int
    stop: int


Meta = Mapping[str, Any] | Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def commit(store: Store, layout: SaveLayout, *, save: str, meta: Meta | None = None, requests: int = 8) -> None:
    """Make the save of that name the checkpoint. One process calls it, after all writers have returned.

    It reads every receipt, writes the root, and then writes COMMIT if there is none yet.

    Args:
        meta: a JSON object of your own, stored in the root; or a function that returns it from the notes in the
            receipts, in the order of the writers.
        requests: number of receipts that are read at the same time.

    Raises:
        FormatError: a receipt is missing or does not match; names it.
        AlreadyCommittedError: another save has committed first.
    """
    digest = layout_digest(layout)

    def receipt_of(writer: int) -> Receipt:
        name = receipt_name(check_save(save), writer)
        what = store.describe(name)
        try:
            receipt = decode_receipt(read_small(store, name, MAX_RECEIPT_BYTES), what)
        except MissingFileError:
            raise MissingFileError(
                what,
                expected=f"the receipt of writer {writer}",
                got="none",
                do="Commit only after every writer has returned.",
            ) from None
        if (receipt.save, receipt.writer, receipt.layout) != (save, writer, digest):
            raise FormatError(
                what,
                expected=f"save {save}, writer {writer}, layout {digest[:12]}",
                got=f"{receipt.save}, {receipt.writer}, {receipt.layout[:12]}",
                do="Give every process the same layout and save name.",
            )
        return receipt

    with ThreadPoolExecutor(max(1, requests), thread_name_prefix="ckpt-commit") as pool:
        receipts = list(pool.map(receipt_of, range(layout.writers)))
    if callable(meta):
        meta = meta([receipt.note for receipt in receipts])
    packs = tuple(receipt.packs for receipt in receipts)
    root = encode_root(Root(save=save, layout=layout, packs=packs, meta=meta or {}))
    store.put(root_name(save), [memoryview(root)], len(root))
    if not store.put_if_absent(COMMIT, encode_commit(save, root)):
        raise AlreadyCommittedError(
            store.describe(COMMIT),
            expected="no COMMIT yet",
            got="one of another save",
            do="That checkpoint stands; this one is void and its files may be removed.",
        )


def _one_ahead(chunks: Generator[memoryview, None, None]) -> Generator[memoryview, None, None]:
    """Yield the same chunks, and prepare the next one in another thread while the store writes this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ckpt-slab") as pool:
        coming = pool.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = pool.submit(next, chunks, None)
            yield chunk


def _check_source(tensor: Tensor, sources: Mapping[str, Source]) -> None:
    if tensor.name not in sources:
        raise FormatError(
            f"tensor {tensor.name!r}",
            expected="its values, of which this process writes a part",
            got="no source by that name",
            do="Give every process all tensors that it holds.",
        )


def _find(tensor: Tensor, box: Box, source: np.ndarray | Sequence[tuple[Box, np.ndarray]]) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    for held, array in source:
        if held == box:
            return array
    raise FormatError(
        f"tensor {tensor.name!r}",
        expected=f"an array for {box}",
        got=f"boxes {[b for b, _ in source][:4]}",
        do="Give every box that the layout assigns to this process.",
    )


def _words(tensor: Tensor, box: Box, array: np.ndarray) -> np.ndarray:
    """Return the bits of the array as unsigned words, after checking shape and dtype."""
    what = f"tensor {tensor.name!r}, {box}"
    array = np.asarray(array)
    name = dtype_name(array, what=what)
    if array.shape != box.shape or name != tensor.dtype:
        raise FormatError(
            what,
            expected=f"{tensor.dtype} {list(box.shape)}",
            got=f"{name} {list(array.shape)}",
            do="Save the values that the layout declares.",
        )
    return as_words(little_endian(array))
