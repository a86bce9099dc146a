"""The root, the receipts and COMMIT: writing and reading them as strict JSON.

The parser does not trust its input. It checks sizes before bytes, counts before objects, and the name and type of every
field, and rejects duplicate keys and NaN. COMMIT, which no checksum protects, must be the canonical text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .boxes import Box
from .errors import FormatError, NewerFormatError, shorten
from .layout import Explicit, SaveLayout, Sharded, Tensor
from .packs import FORMAT, VERSION, root_name
from .rule import SaveMesh
from .strict_json import RESTORE, Fields, canonical, parse, same_text

MAX_ROOT_BYTES, MAX_RECEIPT_BYTES, MAX_COMMIT_BYTES, MAX_META_BYTES = 32 << 20, 4 << 20, 4096, 4 << 20
_NEWER = "Read it with a newer version of this library; nothing in it was changed."
FEATURES: frozenset[str] = frozenset()  # required features that this version knows; version 1 has none
SAVE = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PackRecord:
    """The facts about a pack in the root: bytes of the file, offset of the data, crcs of header and crc table."""

    length: int
    data_begin: int
    header_crc: int
    table_crc: int


@dataclass(frozen=True, kw_only=True)
class Root:
    """A whole checkpoint, except the values. ``packs[w][k]`` is pack k of writer w."""

    save: str
    layout: SaveLayout
    packs: tuple[tuple[PackRecord, ...], ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A writer's statement that its packs are on stable storage. ``layout``: SHA-256 of the layout that it used.

    ``note``: a JSON object of the writer for the committing process, such as sums over the values that it wrote.
    """

    save: str
    writer: int
    layout: str
    packs: tuple[PackRecord, ...]
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The contents of COMMIT: the save, and length and SHA-256 of its root."""

    save: str
    length: int
    sha256: str


def check_save(save: object) -> str:
    """Return ``save`` if it is a valid name of a save. Raises FormatError if it is not."""
    if not isinstance(save, str) or not SAVE.fullmatch(save):
        raise FormatError(
            f"save name {shorten(save)}",
            expected="1 to 40 of a-z, 0-9 and -",
            got="something else",
            do="Use a name that no other attempt has, such as a3-00000120.",
        )
    return save


# ---- writing


def layout_fields(layout: SaveLayout) -> dict[str, Any]:
    """Return the layout as JSON values."""
    return {
        "writers": layout.writers,
        "pack_bytes": layout.pack_bytes,
        "share_bytes": layout.share_bytes,
        "meshes": [_mesh_fields(mesh) for mesh in layout.meshes],
        "tensors": [_tensor_fields(tensor) for tensor in layout.tensors],
    }


def _mesh_fields(mesh: SaveMesh) -> dict[str, Any]:
    fields: dict[str, Any] = {"axes": [[name, size] for name, size in mesh.axes]}
    return fields if mesh.writers is None else fields | {"writers": list(mesh.writers)}


def _tensor_fields(t: Tensor) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": t.name,
        "role": t.role,
        "dtype": t.dtype,
        "shape": list(t.shape),
        "axes": list(t.axes),
        "tile": list(t.tile or ()),
    }
    if isinstance(t.placement, Explicit):
        return fields | {"boxes": [[w, list(b.offset), list(b.shape)] for w, b in t.placement.boxes]}
    if not isinstance(t.placement, Sharded):
        raise TypeError(f"{t.name} is not resolved")
    return fields | {"mesh": t.placement.mesh, "spec": [list(axes) for axes in t.placement.spec]}


def layout_digest(layout: SaveLayout) -> str:
    """Return the SHA-256 of the layout, in hex, by which the committing process checks that all writers agree."""
    return hashlib.sha256(canonical(layout_fields(layout))).hexdigest()


def encode_root(root: Root) -> bytes:
    """Return the bytes of the root.

    Raises:
        FormatError: ``meta`` is not JSON, or too large.
    """
    try:
        meta = canonical(root.meta)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            "meta",
            expected="a JSON object without NaN or infinity",
            got=str(error)[:200],
            do="Write such numbers as strings.",
        ) from None
    parse(meta, "meta", MAX_META_BYTES)  # reject here, before COMMIT, what a reader would reject
    return canonical(
        {
            "format": FORMAT,
            "version": VERSION,
            "features": [],
            "save": root.save,
            **layout_fields(root.layout),
            "packs": [[_record_fields(p) for p in packs] for packs in root.packs],
            "meta": dict(root.meta),
        }
    )


def encode_receipt(receipt: Receipt) -> bytes:
    """Return the bytes of a receipt."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "save": receipt.save,
        "writer": receipt.writer,
        "layout": receipt.layout,
        "packs": [_record_fields(p) for p in receipt.packs],
    }
    return canonical({**fields, "note": dict(receipt.note)} if receipt.note else fields)


def encode_commit(save: str, root: bytes) -> bytes:
    """Return the bytes of COMMIT."""
    return canonical(
        {
            "format": FORMAT,
            "version": VERSION,
            "save": save,
            "root": root_name(save),
            "length": len(root),
            "sha256": hashlib.sha256(root).hexdigest(),
        }
    )


def _record_fields(p: PackRecord) -> list[int]:
    return [p.length, p.data_begin, p.header_crc, p.table_crc]


# ---- reading


def decode_commit(data: bytes, what: str) -> Commit:
    """Parse COMMIT. Raises FormatError, naming ``what``."""
    value = Fields(parse(data, what, MAX_COMMIT_BYTES), what)
    _check_head(value)
    commit = Commit(
        save=value.match("save", SAVE),
        length=value.integer("length", 1, MAX_ROOT_BYTES),
        sha256=value.match("sha256", SHA256),
    )
    value.equal("root", root_name(commit.save))
    value.done()
    same_text(value, data)
    return commit


def decode_receipt(data: bytes, what: str) -> Receipt:
    """Parse a receipt. Raises FormatError, naming ``what``."""
    value = Fields(parse(data, what, MAX_RECEIPT_BYTES), what)
    _check_head(value)
    receipt = Receipt(
        save=value.match("save", SAVE),
        writer=value.integer("writer", 0, 1 << 20),
        layout=value.match("layout", SHA256),
        packs=_records(value.list("packs"), what),
        note=value.take("note", dict) if "note" in value.left else {},
    )
    value.done()
    same_text(value, data)
    return receipt


def decode_root(data: bytes, commit: Commit, what: str) -> Root:
    """Parse the root, after checking its bytes against COMMIT. Raises FormatError, naming ``what``."""

    if len(data) != commit.length:
        raise FormatError(what, expected=f"{commit.length} bytes, as COMMIT says", got=f"{len(data)}", do=RESTORE)
    digest = hashlib.sha256(data).hexdigest()
    if digest != commit.sha256:
        raise FormatError(what, expected=f"SHA-256 {commit.sha256}, as COMMIT says", got=digest, do=RESTORE)
    value = Fields(parse(data, what, MAX_ROOT_BYTES), what)
    _check_head(value)
    unknown = [f for f in value.list("features") if not isinstance(f, str) or f not in FEATURES]
    if unknown:
        raise NewerFormatError(
            what,
            expected=f"required features that this version knows ({', '.join(sorted(FEATURES)) or 'there are none'})",
            got=shorten(unknown[0]),
            do=_NEWER,
        )
    value.equal("save", commit.save)
    fields: dict[str, Any] = {
        "writers": value.integer("writers", 1, 1 << 20),
        "pack_bytes": value.integer("pack_bytes", 1, 1 << 40),
        "share_bytes": value.integer("share_bytes", 1, 1 << 40),
        "meshes": tuple(_mesh(m, f"{what}, mesh {i}") for i, m in enumerate(value.list("meshes"))),
        "tensors": tuple(_tensor(t, f"{what}, tensor {i}") for i, t in enumerate(value.list("tensors"))),
    }
    try:
        layout = SaveLayout(**fields)
    except FormatError as error:
        raise error.inside(what) from None
    packs = tuple(_records(w, what) for w in value.list("packs"))
    if len(packs) != layout.writers:
        raise FormatError(what, expected=f"packs of {layout.writers} writers", got=f"{len(packs)}", do=RESTORE)
    meta = value.take("meta", dict)
    value.done()
    return Root(save=commit.save, layout=layout, packs=packs, meta=meta)


def _mesh(item: object, what: str) -> SaveMesh:
    value = Fields(item, what)
    axes = []
    for axis in value.list("axes"):
        if not (isinstance(axis, list) and len(axis) == 2 and isinstance(axis[0], str) and type(axis[1]) is int):
            raise FormatError(what, expected="axes as [name, size]", got=shorten(axis), do=RESTORE)
        axes.append((axis[0], axis[1]))
    writers = tuple(_integers(value.list("writers"), what)) if "writers" in value.left else None
    value.done()
    return SaveMesh(axes=tuple(axes), writers=writers)


def _tensor(item: object, what: str) -> Tensor:
    value = Fields(item, what)
    name = value.take("name", str)
    value.what = what = f"{what} {shorten(name)}"
    shape, tile = (tuple(_integers(value.list(key), what)) for key in ("shape", "tile"))
    placement: Sharded | Explicit
    if "boxes" in value.left:
        placement = Explicit(boxes=tuple(_box(b, what) for b in value.list("boxes")))
    else:
        spec = tuple(_strings(axes, what) for axes in value.list("spec"))
        placement = Sharded(mesh=value.integer("mesh", 0, 1 << 20), spec=spec)
    tensor = Tensor(
        name=name,
        role=value.take("role", str),
        dtype=value.take("dtype", str),
        shape=shape,
        tile=tile,
        axes=_strings(value.list("axes"), what),
        placement=placement,
    )
    value.done()
    return tensor


def _box(item: object, what: str) -> tuple[int, Box]:
    if not isinstance(item, list) or len(item) != 3 or type(item[0]) is not int:
        raise FormatError(what, expected="boxes as [writer, offset, shape]", got=shorten(item), do=RESTORE)
    return item[0], Box(tuple(_integers(item[1], what)), tuple(_integers(item[2], what)))


def _records(items: object, what: str) -> tuple[PackRecord, ...]:
    if not isinstance(items, list):
        raise FormatError(what, expected="a list of packs", got=shorten(items), do=RESTORE)
    records = []
    for item in items:
        numbers = _integers(item, what)
        if len(numbers) != 4 or not (0 < numbers[1] <= numbers[0] < 1 << 62 and max(numbers[2:]) < 1 << 32):
            raise FormatError(
                what, expected="packs as [length, data_begin, header_crc, table_crc]", got=shorten(item), do=RESTORE
            )
        records.append(PackRecord(*numbers))
    return tuple(records)


def _integers(items: object, what: str) -> Sequence[int]:
    if not isinstance(items, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in items):
        raise FormatError(what, expected="a list of whole numbers", got=shorten(items), do=RESTORE)
    return items


def _strings(items: object, what: str) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(s, str) for s in items):
        raise FormatError(what, expected="a list of strings", got=shorten(items), do=RESTORE)
    return tuple(items)


def _check_head(value: Fields) -> None:
    value.equal("format", FORMAT)
    version = value.take("version", int)
    if version != VERSION:
        kind, do = (NewerFormatError, _NEWER) if version > VERSION else (FormatError, RESTORE)
        raise kind(f"{value.what}, version", expected=str(VERSION), got=shorten(version), do=do)
