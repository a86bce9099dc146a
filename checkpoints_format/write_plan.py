"""Who writes which tiles into which pack: from the layout alone, on any process, with no communication."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .boxes import Box
from .layout import Explicit, SaveLayout, Sharded
from .packs import PackEntry, Run, SavePack, fill_packs
from .rule import ShardRule
from .tiles import Grid

_KEPT_PLANS, _MAX_PACKS = 4096, 1 << 20


def sharers_of(box_bytes: int, replicas: int, share_bytes: int) -> int:
    """Among how many of its replicas the writing of a box is shared."""
    return max(1, min(replicas, box_bytes // share_bytes))


def replica_of_share(share: int, sharers: int, replicas: int, tensor: int) -> int:
    """The replica that writes a share. Starts at the tensor's number, so that small tensors spread."""
    return (tensor + share * (replicas // sharers)) % replicas


def share_of_replica(replica: int, sharers: int, replicas: int, tensor: int) -> int | None:
    """The share that a replica writes, or None."""
    share, rest = divmod((replica - tensor) % replicas, replicas // sharers)
    return share if rest == 0 and share < sharers else None


def share_tiles(share: int, sharers: int, tiles: int) -> tuple[int, int]:
    """First and one past the last tile of a share."""
    return share * tiles // sharers, (share + 1) * tiles // sharers


@dataclass(frozen=True)
class WriterPlan:
    """All pack files of one writer."""

    writer: int
    packs: tuple[SavePack, ...]

    @cached_property
    def entries(self) -> dict[tuple[int, tuple[int, ...]], list[tuple[int, PackEntry]]]:
        """(tensor number, offset of the box) to (number of the pack, entry)."""
        found: dict[tuple[int, tuple[int, ...]], list[tuple[int, PackEntry]]] = {}
        for number, pack in enumerate(self.packs):
            for entry in pack.entries:
                found.setdefault((entry.run.tensor, entry.run.box.offset), []).append((number, entry))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of values that this writer writes."""
        return sum(entry.nbytes for pack in self.packs for entry in pack.entries)


class Planner:
    """Answers about one layout. Plans of writers are kept, so asking again costs nothing.

    Args:
        limits: for each writer the number of packs beyond which its plan is an error.
    """

    def __init__(self, layout: SaveLayout, limits: Sequence[int] | None = None) -> None:
        self.layout, self._limits = layout, limits
        self._plans: dict[int, WriterPlan] = {}
        self._rules: dict[int, ShardRule] = {}
        self._explicit: dict[int, dict[int, list[Box]]] = {}
        for index, tensor in enumerate(layout.tensors):
            placement = tensor.placement
            if isinstance(placement, Sharded):
                self._rules[index] = ShardRule(tensor.shape, placement.spec, layout.meshes[placement.mesh])
            elif isinstance(placement, Explicit):
                by_writer = self._explicit[index] = {}
                for writer, box in placement.boxes:
                    by_writer.setdefault(writer, []).append(box)

    def writer(self, writer: int) -> WriterPlan:
        """The packs of a writer."""
        plan = self._plans.get(writer)
        if plan is None:
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            limit = _MAX_PACKS if self._limits is None else self._limits[writer]
            plan = self._plans[writer] = WriterPlan(writer, fill_packs(self.layout, self.runs(writer), limit))
        return plan

    def runs(self, writer: int) -> Iterator[Run]:
        """What a writer writes: by tensor, then by position (or as listed), then by tile."""
        layout = self.layout
        for index, tensor in enumerate(layout.tensors):
            if tensor.nbytes == 0:
                continue
            if index in self._explicit:
                for box in self._explicit[index].get(writer, ()):
                    grid = Grid(box, tensor.tile or ())
                    yield Run(index, grid, 0, grid.count)
                continue
            rule = self._rules[index]
            mesh = layout.meshes[tensor.placement.mesh]  # type: ignore[union-attr]
            sharers = self._sharers(index)
            for position in mesh.positions_of(writer, layout.writers):
                share = share_of_replica(rule.replica_at(position), sharers, rule.replicas, index)
                if share is None:
                    continue
                grid = Grid(rule.box(rule.part_at(position)), tensor.tile or ())
                first, stop = share_tiles(share, sharers, grid.count)
                if first < stop:
                    yield Run(index, grid, first, stop)

    def sources(self, tensor: int, want: Box) -> Iterator[tuple[Box, list[int]]]:
        """The boxes that meet a (non-empty) wanted box, each with the writers of its tiles."""
        if tensor in self._explicit:
            for writer, boxes in self._explicit[tensor].items():
                yield from ((box, [writer]) for box in boxes if box.intersect(want))
            return
        rule, layout = self._rules[tensor], self.layout
        mesh = layout.meshes[layout.tensors[tensor].placement.mesh]  # type: ignore[union-attr]
        sharers = self._sharers(tensor)
        for part in rule.parts_meeting(want):
            box = rule.box(part)
            grid = Grid(box, layout.tensors[tensor].tile or ())
            low, high = _tile_span(grid, want)
            writers = []
            for share in range(sharers):
                first, stop = share_tiles(share, sharers, grid.count)
                if first < high and stop > low:
                    replica = replica_of_share(share, sharers, rule.replicas, tensor)
                    writers.append(mesh.writer_of(rule.position_of(part, replica), layout.writers))
            yield box, list(dict.fromkeys(writers))

    def _sharers(self, index: int) -> int:
        tensor, rule = self.layout.tensors[index], self._rules[index]
        box_bytes = Box.whole(rule.extents).size * tensor.item_bytes
        return sharers_of(box_bytes, rule.replicas, self.layout.share_bytes)


def _tile_span(grid: Grid, want: Box) -> tuple[int, int]:
    """Smallest range of tile numbers of the grid that holds all tiles meeting ``want``."""
    low = high = 0
    for d, stride in enumerate(grid.strides):
        offset, extent = grid.box.offset[d], grid.box.shape[d]
        begin = max(want.offset[d] - offset, 0)
        end = min(want.offset[d] + want.shape[d] - offset, extent)
        low += grid.tile_at(d, begin) * stride
        high += grid.tile_at(d, end - 1) * stride
    return low, high + 1
