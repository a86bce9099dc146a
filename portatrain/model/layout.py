"""Meshes and layouts: which device holds which part of a tensor.

A `Layout` is a mesh and two mappings from logical axes to mesh axes. All sharding is decided here, and all sharding
errors are raised here. Backends convert a layout to a `PartitionSpec` (JAX), to DTensor placements and FSDP2's shard
dimension (torch) or to an XLA SPMD spec; checkpoints convert it to boxes. Plain Python.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from portatrain.errors import UserError, choice
from portatrain.model.module import Definition, TensorInfo

MESH_AXES = ("replica", "fsdp", "expert", "context", "tensor")
"""The mesh axes, major to minor: neighbours on `tensor` are the nearest devices. `stage` is reserved for pipelines."""

BATCH_MESH_AXES = ("replica", "fsdp", "expert")
"""The mesh axes that shard the batch."""

Axes = str | tuple[str, ...]
Spec = tuple[tuple[str, ...], ...]
"""For each dimension of a tensor, the mesh axes that shard it, major first."""

COMPUTE: Mapping[str, Axes] = {
    "batch": BATCH_MESH_AXES,
    "seq": "context",
    "res_seq": ("context", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "key_heads": "tensor",
    "value_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}
"""The default mapping for activations. `res_seq` is the sequence axis of the residual stream."""

PARAMS: Mapping[str, Axes] = {"embed": "fsdp", "latent": "fsdp"}
"""The entries that the default mapping for parameters adds to `COMPUTE`. This line is FSDP. `latent` is the input of
the matrices of `LatentAttention` that make heads from a latent, which have no axis `embed`."""


UNSPLIT = frozenset(
    {
        *("layers", "head_dim", "value_dim", "nope_dim", "rope_dim", "q_rank", "kv_rank"),
        *("patches", "patch_rows", "patch_columns", "channels", "classes", "lora_rank", "joined", "positions"),
        *("projected", "scalar", "modulations", "frequencies"),
        *("key_size", "value_size", "taps"),
    }
)
"""The axes of the layers and models that come with portatrain which no default mapping names: they are whole on every
device, and are meant to be."""


@dataclass(frozen=True, kw_only=True)
class UnknownAxis:
    """A logical axis that no mapping knows: it is whole on every device, as a misspelt one is."""

    axis: str
    tensors: tuple[str, ...]
    nearest: str | None
    """The known axis with the most similar name, if one is similar."""

    @property
    def do(self) -> str:
        """What to do about it."""
        meant = f"Did you mean {self.nearest}? " if self.nearest else ""
        return f"{meant}If that is intended, declare it in the recipe: compute={{{self.axis!r}: ()}}."

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
        return (
            f"axis {self.axis!r} of {self.tensors[0]}{more} is in no mapping, so it is whole on every device. {self.do}"
        )


def unknown_axes(
    model: Definition, *, compute: Mapping[str, Axes] | None = None, params: Mapping[str, Axes] | None = None
) -> list[UnknownAxis]:
    """Return the axes of `model` that no mapping knows, in the order of its tensors.

    Known are the axes of the default mappings, `UNSPLIT`, the axes of Stacks, and every key of `compute` and `params`
    (a recipe's), also one that is mapped to (): that says that the axis stays whole on purpose.
    """
    known = {*COMPUTE, *PARAMS, *UNSPLIT, *(compute or ()), *(params or ())}
    found: dict[str, list[str]] = {}
    for tensor in model.tensors.values():
        for axis in tensor.axes[tensor.stack_dims :]:
            if axis not in known:
                found.setdefault(axis, []).append(tensor.name)
    return [
        UnknownAxis(
            axis=axis,
            tensors=tuple(tensors),
            nearest=next(iter(difflib.get_close_matches(axis, sorted(known), n=1)), None),
        )
        for axis, tensors in found.items()
    ]


def axis_warning(unknown: Sequence[UnknownAxis]) -> str:
    """Return one warning for all axes that no mapping knows; '' if there are none."""
    if len(unknown) < 2:
        return "".join(map(str, unknown))
    names = [repr(one.axis) for one in unknown]
    tensors = list(dict.fromkeys(name for one in unknown for name in one.tensors))
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    meant = [f"{one.nearest} for {one.axis}" for one in unknown if one.nearest]
    hint = f"Did you mean {', '.join(meant)}? " if meant else ""
    return (
        f"axes {', '.join(names[:-1])} and {names[-1]} of {tensors[0]}{more} are in no mapping, so they are whole on "
        f"every device. {hint}"
        f"If that is intended, declare it in the recipe: compute={{{', '.join(f'{name}: ()' for name in names)}}}."
    )


_UNEVEN = "a size that {} divides"


def is_uneven(error: UserError) -> bool:
    """Return whether an error is one of `Layout.uneven`, also if it comes from another process."""
    before, after = _UNEVEN.split("{}")
    return error.expected.startswith(before) and error.expected.endswith(after)


def _tuple(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


@dataclass(frozen=True)
class Mesh:
    """A grid of devices: the size of each mesh axis, in the order of `MESH_AXES`.

    Raises:
        UserError: a size is not a whole number of at least 1.
    """

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(
                    f"mesh axis {axis}",
                    expected="a whole number of at least 1",
                    got=repr(size),
                    do="Write the mesh as fsdp=4,tensor=2.",
                )

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Return the mesh of a text such as "fsdp=4,tensor=2"; the empty text gives one device.

        Raises:
            UserError: an unknown or repeated axis, or a size that is not a whole number.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, sign, size = part.partition("=")
            if axis not in MESH_AXES:
                raise choice(f"mesh {text!r}", axis, MESH_AXES)
            if not sign or not size.isdigit() or axis in sizes:
                raise UserError(
                    f"mesh {text!r}",
                    expected="each axis once, with a whole number, as in fsdp=4,tensor=2",
                    got=repr(part),
                    do="Write the mesh as axis=size, separated by commas.",
                )
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size, in the order of `MESH_AXES`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes.values())

    def over(self, axes: Iterable[str]) -> int:
        """Return the number of shards over the mesh axes `axes`, the product of their sizes."""
        return math.prod(self.sizes[a] for a in axes)

    def index(self, axes: Iterable[str], at: Mapping[str, int]) -> int:
        """Return the number, row-major over `axes` (major first), of the shard of the device at coordinates `at`."""
        found = 0
        for axis in axes:
            found = found * self.sizes[axis] + at[axis]
        return found

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the mesh coordinates of device `rank`; ranks are row-major over `MESH_AXES`."""
        found = {}
        for axis in reversed(MESH_AXES):
            rank, found[axis] = divmod(rank, self.sizes[axis])
        return found

    def __str__(self) -> str:
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "1"


@dataclass(frozen=True)
class Layout:
    """A mesh and two mappings from logical axes to mesh axes. Build one for a model with `Layout.of`."""

    mesh: Mesh = field(default_factory=Mesh)
    """The devices."""
    compute: Mapping[str, Axes] = field(default_factory=lambda: dict(COMPUTE))
    """The mapping for activations and for States."""
    params: Mapping[str, Axes] = field(default_factory=lambda: {**COMPUTE, **PARAMS})
    """The mapping for parameters, their averages and the optimizer's slots."""
    known: frozenset[str] | None = None
    """The logical axes that are valid, in mappings and in tensors. None: all are."""

    @classmethod
    def of(
        cls,
        model: Definition,
        mesh: Mesh | None = None,
        *,
        compute: Mapping[str, Axes] | None = None,
        params: Mapping[str, Axes] | None = None,
    ) -> Layout:
        """Return the layout of `model` on `mesh`.

        Args:
            mesh: None is one device.
            compute, params: entries that replace those of the default mappings `COMPUTE` and `PARAMS`.

        Raises:
            UserError: a tensor cannot be sharded evenly, or a mapping is invalid. Nothing has been allocated yet.
        """
        mine = {**COMPUTE, **(compute or {})}
        layout = cls(
            mesh=mesh or Mesh(),
            compute=mine,
            params={**mine, **PARAMS, **(params or {})},
            known=model.axes | frozenset(mine) | frozenset(params or {}) | {"batch", "seq"},
        )
        layout.check(model)
        return layout

    # ---- specs

    def spec(self, axes: Sequence[str | None], *, role: str = "compute", what: str = "value") -> Spec:
        """Return the mesh axes of each dimension of an array with these logical `axes` (None: not sharded).

        Args:
            role: 'compute' for activations, 'params', 'state' or 'opt'.
            what: the name of the array, for messages.

        Raises:
            UserError: an unknown logical axis, or a mesh axis that would shard two dimensions.
        """
        mapping = self._mapping(role)
        spec = []
        for axis in axes:
            if axis is not None and self.known is not None and axis not in self.known:
                raise choice(f"logical axis in {what}", axis, self.known)
            spec.append(_tuple(mapping.get(axis, ())) if axis is not None else ())
        used = [a for dim in spec for a in dim]
        twice = next((a for a in used if used.count(a) > 1), None)
        if twice is not None:
            pairs = ", ".join(f"{a}->{'/'.join(s)}" for a, s in zip(axes, spec, strict=True) if s)
            raise UserError(
                f"layout of {what}",
                expected="a mesh axis at most once in a tensor",
                got=f"{twice!r} twice ({pairs})",
                do="Rename one of the axes (embed_out), or map it elsewhere.",
            )
        return tuple(spec)

    def tensor_spec(self, tensor: TensorInfo, *, role: str | None = None) -> Spec:
        """Return the mesh axes of each dimension of a logical tensor.

        The axis kv_heads is an exception. If the mesh axes have more shards than kv_heads, and a multiple of them, the
        dimension is replicated: each device computes with the whole, small tensor.

        Raises:
            UserError: a dimension does not divide over its mesh axes; as in `spec`.
        """
        spec = list(self.spec(tensor.axes, role=role or tensor.role, what=tensor.name))
        for dim, (axis, size) in enumerate(zip(tensor.axes, tensor.shape, strict=True)):
            shards = self.mesh.over(spec[dim])
            if axis == "kv_heads" and size < shards and shards % size == 0:
                spec[dim] = ()
            elif size % shards:
                raise self.uneven(tensor.name, axis, size, spec[dim])
        return tuple(spec)

    def _mapping(self, role: str) -> Mapping[str, Axes]:
        if role == "compute" or role == "state":  # a State is sharded as activations are
            return self.compute
        return self.params

    def uneven(self, what: str, axis: str | None, size: int, over: tuple[str, ...]) -> UserError:
        """Return the error for an axis of `what` whose size the shards over the mesh axes `over` do not divide."""
        shards = self.mesh.over(over)
        up = -(-size // shards) * shards
        near = f"{up - shards} or {up}" if up > shards else str(up)
        used = [a for a in over if self.mesh.sizes[a] > 1]
        split = " x ".join(f"{a}={self.mesh.sizes[a]}" for a in used)
        return UserError(
            f"{what}, axis {axis!r} on mesh {self.mesh}",
            expected=_UNEVEN.format(split),
            got=str(size),
            do=f"The nearest sizes that work are {near}; or use a smaller {' or '.join(used)} axis.",
        )

    # ---- boxes

    def box(
        self, tensor: TensorInfo, at: Mapping[str, int], *, role: str | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the box, (offset, shape) in elements, of `tensor` on the device at mesh coordinates `at`."""
        offset, shape = [], []
        for size, over in zip(tensor.shape, self.tensor_spec(tensor, role=role), strict=True):
            mine = size // self.mesh.over(over)
            offset.append(self.mesh.index(over, at) * mine)
            shape.append(mine)
        return tuple(offset), tuple(shape)

    def check(self, model: Definition) -> None:
        """Raise UserError unless the mappings name valid mesh axes and every tensor of `model` divides evenly."""
        for mapping in (self.compute, self.params):
            for logical, axes in mapping.items():
                for axis in _tuple(axes):
                    if axis not in MESH_AXES:
                        raise choice(f"mapping {logical!r}", axis, MESH_AXES)
        self._check_context(model)
        for tensor in model.tensors.values():
            self.tensor_spec(tensor)
        used = {a for t in model.tensors.values() for dim in self.tensor_spec(t) for a in dim}
        if self.mesh.expert > 1 and "expert" not in used:
            raise UserError(
                f"mesh {self.mesh}",
                expected="an 'experts' axis in the model for the mesh axis 'expert'",
                got=f"a model with the axes {', '.join(sorted(model.axes))}",
                do="Use fsdp or replica for a dense model.",
            )

    def _check_context(self, model: Definition) -> None:
        """Raise UserError if the mesh splits positions and a module of `model` says `whole_sequence`."""
        whole = [path for path, module in model.modules.items() if getattr(module, "whole_sequence", False)]
        if self.mesh.context == 1 or not whole:
            return
        raise split_positions(f"{whole[0]} ({type(model.modules[whole[0]]).__name__})", self.mesh.context)

    def check_batch(self, microbatch: int, seq_len: int | None = None) -> None:
        """Raise UserError unless the samples of a microbatch, and their positions, divide evenly over the mesh."""

        for axis, size in (("batch", microbatch), ("seq", seq_len), ("res_seq", seq_len)):
            over = self.spec((axis,), what="a batch")[0]
            if size is not None and size % self.mesh.over(over):
                raise self.uneven("a microbatch", axis, size, over)


def split_positions(layer: str, context: int) -> UserError:
    """Return the error for a mesh axis context of that size and a recurrent `layer`."""
    return UserError(
        f"mesh axis context={context}",
        expected=f"context=1: {layer} is recurrent, and a position needs the state that the one before it leaves",
        got=f"{context} devices with a part of the positions each",
        do="Give these devices to fsdp or tensor; remat='block' and a smaller microbatch save memory for long samples.",
    )
