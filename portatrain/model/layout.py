"""Where tensors lie: a mesh, two mappings from logical axes to mesh axes, and the boxes that follow.

This is the only place that decides, and the only one that raises a sharding error. A `Layout` becomes a
`PartitionSpec` (JAX), DTensor placements and FSDP2's shard dimension (torch), an XLA SPMD spec, or a
checkpoint's boxes. A layout for one device is a layout like any other. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from portatrain.errors import UserError, choice
from portatrain.model.module import Definition, TensorInfo

MESH_AXES = ("replica", "fsdp", "expert", "context", "tensor")
"""The mesh axes, major to minor: neighbours on `tensor` are the nearest devices. `stage` is kept for pipelines."""

BATCH_MESH_AXES = ("replica", "fsdp", "expert")

Axes = str | tuple[str, ...]
Spec = tuple[tuple[str, ...], ...]
"""For every dimension of a tensor the mesh axes that split it, major first."""

COMPUTE: Mapping[str, Axes] = {
    "batch": BATCH_MESH_AXES,
    "seq": "context",
    "res_seq": ("context", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
}
"""Where values lie while computing. `res_seq` is the sequence axis of the residual stream."""

PARAMS: Mapping[str, Axes] = {"embed": "fsdp"}
"""What the params mapping adds to `COMPUTE`: FSDP is this one line."""


def _tuple(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


@dataclass(frozen=True)
class Mesh:
    """A grid of devices: sizes of the mesh axes, every axis present, in the order of `MESH_AXES`."""

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
        """`Mesh.parse("fsdp=4,tensor=2")`; the empty text is the mesh of one device."""
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
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    def over(self, axes: Iterable[str]) -> int:
        """The number of shards that splitting over `axes` makes."""
        return math.prod(self.sizes[a] for a in axes)

    def index(self, axes: Iterable[str], at: Mapping[str, int]) -> int:
        """Return the number, row-major over `axes` (major first), of the shard of the device at coordinates `at`."""
        found = 0
        for axis in axes:
            found = found * self.sizes[axis] + at[axis]
        return found

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of device `rank`, counted row-major over `MESH_AXES`."""
        found = {}
        for axis in reversed(MESH_AXES):
            rank, found[axis] = divmod(rank, self.sizes[axis])
        return found

    def __str__(self) -> str:
        return ",".join(f"{a}={n}" for a, n in self.sizes.items() if n > 1) or "1"


@dataclass(frozen=True)
class Layout:
    """A mesh and the two mappings: `compute` for values, `params` for parameters, their averages and slots.

    `known` are the logical axes that may be named besides those of the mappings (those of the model's tensors);
    None allows any. Build one for a model with `Layout.of`.
    """

    mesh: Mesh = field(default_factory=Mesh)
    compute: Mapping[str, Axes] = field(default_factory=lambda: dict(COMPUTE))
    params: Mapping[str, Axes] = field(default_factory=lambda: {**COMPUTE, **PARAMS})
    known: frozenset[str] | None = None

    @classmethod
    def of(
        cls,
        model: Definition,
        mesh: Mesh | None = None,
        *,
        compute: Mapping[str, Axes] | None = None,
        params: Mapping[str, Axes] | None = None,
    ) -> Layout:
        """The layout of `model` on `mesh`, with `compute` and `params` entries laid over the default mappings.

        Checks everything that can be checked before anything is allocated; raises UserError.
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
        """The mesh axes of every dimension of something with these logical `axes` (None: not split).

        `role` is 'compute' for values, 'params', 'state' or 'opt'. Raises UserError for an unknown logical axis
        and for a mesh axis used twice.
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
        """The spec of a logical tensor, with kv_heads replicated where there are fewer of them than the axis.

        Rule: kv_heads that the mesh axes divide are split; where the mesh axes' size is a multiple of kv_heads the
        dimension is replicated (each device computes with the whole, small tensor); anything else is an error.
        """
        spec = list(self.spec(tensor.axes, role=role or tensor.role, what=tensor.name))
        for dim, (axis, size) in enumerate(zip(tensor.axes, tensor.shape, strict=True)):
            shards = self.mesh.over(spec[dim])
            if axis == "kv_heads" and size < shards and shards % size == 0:
                spec[dim] = ()
            elif size % shards:
                raise self._uneven(tensor.name, axis, size, spec[dim])
        return tuple(spec)

    def _mapping(self, role: str) -> Mapping[str, Axes]:
        if role == "compute" or role == "state":  # a model's State lies where values lie
            return self.compute
        return self.params

    def _uneven(self, what: str, axis: str, size: int, over: tuple[str, ...]) -> UserError:
        shards = self.mesh.over(over)
        up = -(-size // shards) * shards
        near = f"{up - shards} or {up}" if up > shards else str(up)
        split = " x ".join(f"{a}={self.mesh.sizes[a]}" for a in over)
        return UserError(
            f"{what}, axis {axis!r} on mesh {self.mesh}",
            expected=f"a size that {split} divides",
            got=str(size),
            do=f"The nearest sizes that work are {near}; or use a smaller {over[-1]} axis.",
        )

    # ---- boxes

    def box(
        self, tensor: TensorInfo, at: Mapping[str, int], *, role: str | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offset, shape) of the part of `tensor` on the device at mesh coordinates `at`."""
        offset, shape = [], []
        for size, over in zip(tensor.shape, self.tensor_spec(tensor, role=role), strict=True):
            mine = size // self.mesh.over(over)
            offset.append(self.mesh.index(over, at) * mine)
            shape.append(mine)
        return tuple(offset), tuple(shape)

    def check(self, model: Definition) -> None:
        """Raise UserError unless every tensor of `model` divides, and every mesh axis is one that a mapping names."""
        for mapping in (self.compute, self.params):
            for logical, axes in mapping.items():
                for axis in _tuple(axes):
                    if axis not in MESH_AXES:
                        raise choice(f"mapping {logical!r}", axis, MESH_AXES)
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

    def check_batch(self, microbatch: int, seq_len: int | None = None) -> None:
        """Raise UserError unless the samples (and positions) of a microbatch divide over the mesh."""
        for axis, size in (("batch", microbatch), ("seq", seq_len), ("res_seq", seq_len)):
            over = self.spec((axis,), what="a batch")[0]
            if size is not None and size % self.mesh.over(over):
                raise self._uneven("a microbatch", axis, size, over)
