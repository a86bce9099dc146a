"""What a checkpoint holds, and who holds which part of it: tensors, meshes, placements.

Everything here is logical: no bytes, no files. A ``SaveLayout`` is small (one entry a tensor), the same on
every process, and enough to compute every file name, header and offset of the checkpoint.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .boxes import Box, prove_cover
from .dtypes import check_dtype, item_bytes
from .errors import FormatError, shorten
from .rule import SaveMesh, ShardRule
from .tiles import MAX_TILE_BYTES, tile_shape

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-\[\]=+]*(/[A-Za-z0-9_][A-Za-z0-9_.\-\[\]=+]*)*")
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
MAX_NAME, MAX_DIMS, MAX_ELEMENTS = 512, 12, 1 << 50
BATCH_AXES = ("layers", "experts")
_MAX_PLACEMENTS = 1 << 22  # planning a writer takes a few microseconds for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """Regular boxes: dimension d is cut into equal parts over the mesh axes ``spec[d]``, major first.

    SaveMesh axes that ``spec`` does not name hold replicas; replicas share the writing.
    """

    spec: tuple[tuple[str, ...], ...]
    mesh: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Explicit:
    """Irregular boxes, listed as (writer, box). They cover the tensor exactly, without overlap."""

    boxes: tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One logical tensor.

    Args:
        name: canonical name such as ``params/blocks/attn/wq``; unique; parts joined by "/".
        dtype: a name of ``dtypes.NUMPY``.
        shape: global shape; () is a scalar, a 0 anywhere makes it empty.
        axes: a name for each dimension, or () where they have none.
        role: params, opt, state, ema, step, rng, data, or any word.
        placement: who holds which box. The default, every position a replica, suits small tensors.
        batch: number of leading dimensions that are batches of independent tensors; None counts the
            leading axes named ``layers`` or ``experts``.
        tile: extents of a tile; None takes the formula of ``tiles.tile_shape``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    role: str = "params"
    placement: Sharded | Explicit | None = None
    batch: int | None = None
    tile: tuple[int, ...] | None = None

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return item_bytes(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes

    def resolved(self) -> Tensor:
        """The same tensor with ``tile``, ``batch`` and ``placement`` filled in and everything checked."""
        what = f"tensor {shorten(self.name)}"
        _check(
            what,
            isinstance(self.name, str) and len(self.name) <= MAX_NAME and bool(NAME.fullmatch(self.name)),
            "a name of parts joined by '/', each of letters, digits and _.-[]=+",
            shorten(self.name),
            "Rename the tensor.",
        )
        check_dtype(self.dtype, what=what)
        shape = tuple(self.shape)
        _check(
            what,
            len(shape) <= MAX_DIMS
            and all(type(n) is int and n >= 0 for n in shape)
            and math.prod(max(n, 1) for n in shape) <= MAX_ELEMENTS,
            f"a shape of at most {MAX_DIMS} sizes, at most 2^50 elements",
            shorten(shape),
            "Mend the shape.",
        )
        axes = tuple(self.axes)
        _check(
            what,
            (not axes or len(axes) == len(shape))
            and all(isinstance(a, str) and WORD.fullmatch(a) and len(a) <= 64 for a in axes),
            f"no axis names or {len(shape)}",
            shorten(axes),
            "Name each dimension, or none.",
        )
        _check(
            what,
            isinstance(self.role, str) and len(self.role) <= 64 and bool(WORD.fullmatch(self.role)),
            "a word as role",
            shorten(self.role),
            "Use params, opt, state, ema, step, rng or data.",
        )
        batch = self.batch
        if batch is None:
            batch = next((d for d, a in enumerate(axes) if a not in BATCH_AXES), len(axes))
        _check(
            what,
            type(batch) is int and 0 <= batch <= len(shape),
            f"batch from 0 to {len(shape)}",
            shorten(batch),
            "Count the leading batch dimensions.",
        )
        tile = tuple(self.tile) if self.tile is not None else tile_shape(shape, self.item_bytes, batch)
        _check(
            what,
            len(tile) == len(shape)
            and all(type(t) is int and 1 <= t <= max(n, 1) for t, n in zip(tile, shape, strict=True))
            and math.prod(tile) * self.item_bytes <= MAX_TILE_BYTES,
            f"a tile within the shape and {MAX_TILE_BYTES} bytes",
            shorten(tile),
            "Leave the tile to the formula.",
        )
        placement = self.placement if self.placement is not None else Sharded(spec=((),) * len(shape))
        return Tensor(
            name=self.name,
            dtype=self.dtype,
            shape=shape,
            axes=axes,
            role=self.role,
            placement=placement,
            batch=batch,
            tile=tile,
        )


def _check(what: str, ok: bool, expected: str, got: str, do: str) -> None:
    if not ok:
        raise FormatError(what, expected=expected, got=got, do=do)


@dataclass(frozen=True, kw_only=True)
class SaveLayout:
    """Everything that fixes a checkpoint's files, apart from the values: the same on every process.

    Args:
        tensors: in the order in which they are written.
        writers: number of processes that write; writer w has number w.
        meshes: grids that placements refer to by index; default: one axis, a position a writer.
        pack_bytes: a pack file is closed before its tiles would exceed this (256 MiB to 2 GiB in use).
        share_bytes: replicas share the writing of a box in parts of about this much or more.

    Raises:
        FormatError: naming the tensor and what does not fit.
    """

    tensors: tuple[Tensor, ...]
    writers: int = 1
    meshes: tuple[SaveMesh, ...] = ()
    pack_bytes: int = 1 << 30
    share_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        what = "layout"
        _check(
            what,
            type(self.writers) is int and 1 <= self.writers <= 1 << 20,
            "1 to 2^20 writers",
            shorten(self.writers),
            "Give the number of processes.",
        )
        for field in ("pack_bytes", "share_bytes"):
            value = getattr(self, field)
            _check(
                f"layout {field}",
                type(value) is int and 1 <= value <= 1 << 40,
                "1 to 2^40 bytes",
                shorten(value),
                "Use 256 MiB to 2 GiB for packs, 1 MiB for shares.",
            )
        meshes = tuple(self.meshes) or (SaveMesh(axes=(("writer", self.writers),)),)
        for index, mesh in enumerate(meshes):
            _check_mesh(mesh, index, self.writers)
        tensors = tuple(t.resolved() for t in self.tensors)
        names: set[str] = set()
        for tensor in tensors:
            _check(f"tensor {tensor.name!r}", tensor.name not in names, "each name once", "it twice", "Rename one.")
            names.add(tensor.name)
            _check_placement(tensor, meshes, self.writers)
        held = max(mesh.most_positions(self.writers) for mesh in meshes)
        _check(
            "layout",
            held * len(tensors) <= _MAX_PLACEMENTS,
            f"positions of a writer times tensors at most {_MAX_PLACEMENTS}",
            f"{held} x {len(tensors)}",
            "Stack the layers into one tensor, or let more processes write.",
        )
        object.__setattr__(self, "meshes", meshes)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "_index", {t.name: i for i, t in enumerate(tensors)})

    def index(self, name: str) -> int:
        """Number of the tensor of that name.

        Raises:
            FormatError: no such tensor; names the nearest ones.
        """
        index: dict[str, int] = self._index  # type: ignore[attr-defined]
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3) or sorted(index)[:3]
            raise FormatError(
                f"tensor {shorten(name)}",
                expected=f"one of the {len(index)} tensors of the checkpoint",
                got="no such name",
                do=f"The nearest names are {', '.join(near) or 'none'}.",
            )
        return index[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; FormatError if there is none."""
        return self.tensors[self.index(name)]

    def boxes_of(self, writer: int) -> Iterator[tuple[Tensor, Box]]:
        """The boxes that a writer holds, each once, in order of tensors and positions."""
        for tensor in self.tensors:
            if isinstance(tensor.placement, Explicit):
                yield from ((tensor, box) for w, box in tensor.placement.boxes if w == writer)
            elif isinstance(tensor.placement, Sharded):
                mesh = self.meshes[tensor.placement.mesh]
                rule = ShardRule(tensor.shape, tensor.placement.spec, mesh)
                boxes = (rule.box(rule.part_at(p)) for p in mesh.positions_of(writer, self.writers))
                yield from ((tensor, box) for box in dict.fromkeys(boxes))


def _check_mesh(mesh: SaveMesh, index: int, writers: int) -> None:
    what = f"mesh {index}"
    ok = all(
        isinstance(a, str) and len(a) <= 64 and WORD.fullmatch(a) and type(n) is int and n >= 1 for a, n in mesh.axes
    )
    _check(
        what,
        ok and len({a for a, _ in mesh.axes}) == len(mesh.axes) <= 32,
        "at most 32 axes, each a name with a size",
        shorten(mesh.axes),
        "Name each mesh axis once, with a size of at least 1.",
    )
    positions = mesh.positions
    _check(what, positions <= 1 << 20, "at most 2^20 positions", str(positions), "Describe fewer devices.")
    if mesh.writers is None:
        _check(
            what,
            positions % writers == 0,
            f"a multiple of {writers} positions",
            str(positions),
            "List the writer of each position.",
        )
    else:
        _check(
            what,
            len(mesh.writers) == positions and all(type(w) is int and 0 <= w < writers for w in mesh.writers),
            f"{positions} writers from 0 to {writers - 1}",
            f"{len(mesh.writers)} numbers",
            "List the writer of each position.",
        )


def _check_placement(tensor: Tensor, meshes: Sequence[SaveMesh], writers: int) -> None:
    what, placement = f"tensor {tensor.name!r}", tensor.placement
    if isinstance(placement, Explicit):
        _check(
            what,
            all(type(w) is int and 0 <= w < writers for w, _ in placement.boxes),
            f"writers from 0 to {writers - 1}",
            "another number",
            "Mend the list of boxes.",
        )
        prove_cover(tensor.shape, [box for _, box in placement.boxes], what)
        return
    if not isinstance(placement, Sharded):
        raise FormatError(
            what, expected="a placement Sharded or Explicit", got=shorten(placement), do="Use one of them."
        )
    _check(
        what,
        type(placement.mesh) is int and 0 <= placement.mesh < len(meshes),
        f"a mesh from 0 to {len(meshes) - 1}",
        shorten(placement.mesh),
        "Refer to a mesh of the layout.",
    )
    sizes = dict(meshes[placement.mesh].axes)
    _check(
        what,
        len(placement.spec) == len(tensor.shape),
        f"a spec of {len(tensor.shape)} dimensions",
        f"{len(placement.spec)}",
        "Give one tuple of mesh axes a dimension.",
    )
    used = [axis for axes in placement.spec for axis in axes]
    _check(
        what,
        len(set(used)) == len(used) and all(a in sizes for a in used),
        f"mesh axes among {', '.join(sizes)}, each at most once",
        shorten(tuple(used)),
        "Mend the spec.",
    )
    for d, (axes, n) in enumerate(zip(placement.spec, tensor.shape, strict=True)):
        parts = math.prod(sizes[a] for a in axes)
        label = tensor.axes[d] if tensor.axes else f"dimension {d}"
        _check(
            what,
            n % parts == 0,
            f"{label} divisible by {parts} (mesh {' x '.join(axes)})",
            str(n),
            f"The nearest size that works is {max(1, round(n / parts)) * parts}.",
        )
