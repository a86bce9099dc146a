"""Describe a program's checkpoint as a layout of the format, with the part that each process writes."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoints_format import Box, Explicit, Planner, Reader, SaveLayout, SaveMesh, Sharded, Tensor, tile_shape
from portatrain.backends.base import IrregularShards
from portatrain.backends.program import Program
from portatrain.backends.state import COUNT, StateTensor, full_name, inventory
from portatrain.checkpoint.meta import wrong
from portatrain.errors import UserError


def format_layout(
    program: Program,
    irregular_shards: IrregularShards | None = None,
    writers: int = 1,
    owners: Sequence[int] | None = None,
) -> SaveLayout:
    """Return the layout of a checkpoint of `program`: its tensors, and the boxes of each mesh position.

    irregular_shards: the boxes of tensors that do not follow the layout, as `Backend.irregular_shards` gives them.
    owners: the process of every position of the mesh, if processes do not hold equal consecutive runs
    (`shared_reads.owners_of`).
    """
    irregular_shards = irregular_shards or {}
    mesh = {axis: size for axis, size in program.layout.mesh.sizes.items() if size > 1}

    def tensor(held: StateTensor) -> Tensor:
        info, role = held.info, held.role
        spec = program.layout.tensor_spec(info, role=held.laid_out_as)
        by_rule = Sharded(spec=tuple(tuple(a for a in dim if a in mesh) for dim in spec))
        listed = tuple((process, Box(*box)) for process, *box in irregular_shards.get(held.key, ()))
        return Tensor(
            name=full_name(role, info.name),
            dtype=info.dtype,
            shape=info.shape,
            axes=info.axes,
            role=role.split("/")[0],
            batch=info.batch_dims,
            placement=Explicit(boxes=listed) if listed else by_rule,
        )

    tensors = [tensor(held) for held in inventory(program)]
    tensors.append(Tensor(name=COUNT, dtype="int32", shape=(), role="opt"))
    axes = tuple(mesh.items()) or (("device", 1),)
    held_by = None if owners is None else tuple(owners)
    return SaveLayout(tensors=tuple(tensors), meshes=(SaveMesh(axes=axes, writers=held_by),), writers=writers)


def written_by(layout: SaveLayout, writer: int) -> dict[str, list[Box]]:
    """Return the boxes that process `writer` writes, by tensor. Replicas share the work."""
    found: dict[str, list[Box]] = {}
    for pack in Planner(layout).writer(writer).packs:
        for entry in pack.entries:
            boxes = found.setdefault(layout.tensors[entry.run.tensor].name, [])
            if entry.run.box not in boxes:
                boxes.append(entry.run.box)
    return found


def check_step(reader: Reader, step: int, what: str) -> None:
    """Raise UserError if the checkpoint in the folder of `step` is one of another step: the folder was renamed, or is a
    copy; or if its meta has a field of another type than a save writes."""
    if (bad := wrong(reader.meta)) is not None:
        raise UserError(
            f"{what}: {bad[0]} in its meta",
            expected=bad[1],
            got=bad[2],
            do="Its root was changed after the save: restore another checkpoint.",
        )
    saved = reader.meta.get("step")
    if saved is not None and saved != step:
        raise UserError(
            what,
            expected=f"the checkpoint of step {step}, as its folder's name says",
            got=f"the checkpoint of step {saved}",
            do=f"Give the folder its name back (step-{saved:08d}), or remove it if it is a copy; nothing was changed.",
        )


def check_tiles(reader: Reader) -> None:
    """Raise UserError unless the tiles of a run's checkpoint follow from the shapes of its tensors.

    No checksum covers the shape of a tile: another one of as many elements would permute the values. Runs write the
    tiles of the format's rule alone, so any other shape has been put there later.
    """
    for tensor in reader.layout.tensors if "recipe_sha256" in reader.meta else ():
        # A root does not say how many leading axes its layout counted as batch axes.
        by_rule = {tile_shape(tensor.shape, tensor.item_bytes, batch) for batch in range(len(tensor.shape) + 1)}
        if tensor.tile not in by_rule:
            raise _tile(reader, tensor, sorted(by_rule))


def _tile(reader: Reader, tensor: Tensor, right: Sequence[tuple[int, ...]]) -> UserError:
    return UserError(
        f"{reader.store.describe('COMMIT')}: tensor {tensor.name!r}",
        expected=f"tiles of {' or '.join(str(list(tile)) for tile in right)}, which follow from its shape",
        got=str(list(tensor.tile or ())),
        do="Its root was changed after the save: restore another checkpoint.",
    )


def check_tensors(reader: Reader, program: Program, *, axes: bool = True) -> None:
    """Raise UserError, with the differences, unless a checkpoint has the tensors of `program`, with the same shapes and
    with the tiles that follow from them, see `check_tiles`.

    `axes`: False accepts other names of axes, and tiles for any number of batch axes.
    """
    there = {t.name: t for t in reader.layout.tensors}
    wanted = {t.name: t for t in format_layout(program).tensors}
    found = [
        ("not in it", sorted(wanted.keys() - there.keys())),
        ("not the model's", sorted(there.keys() - wanted.keys())),
        (
            "different",
            [
                f"{n} ({there[n].dtype} {list(there[n].shape)} for {t.dtype} {list(t.shape)})"
                for n, t in wanted.items()
                if n in there and (there[n].dtype, there[n].shape) != (t.dtype, t.shape)
            ],
        ),
        (
            "axes of other names",
            [
                f"{n} ({' '.join(there[n].axes)} for {' '.join(t.axes)})"
                for n, t in wanted.items()
                if axes and n in there and there[n].axes and there[n].axes != t.axes
            ],
        ),
    ]
    if any(names for _, names in found):
        got = [
            f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for kind, names in found
            if names
        ]
        raise UserError(
            reader.store.describe("COMMIT"),
            expected="the tensors of this model and optimizer",
            got="; ".join(got),
            do="This is the checkpoint of another model: give the recipe and the sizes that it was saved with.",
        )
    if not axes:
        check_tiles(reader)
        return
    for name, tensor in wanted.items() if "recipe_sha256" in reader.meta else ():
        if (tile := tensor.resolved().tile or ()) != there[name].tile:  # the batch axes are known here: one is right
            raise _tile(reader, there[name], [tile])
