"""Describe a model's parameters for the planner: logical tensors, and sums over those that shard alike.

The rules are those of ``portatrain.model.layout`` (a test compares them): a mapping gives each logical axis its mesh
axes, and sizes must divide. If the number of shards is a multiple of kv_heads, kv_heads are held whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from portatrain.model.layout import COMPUTE, MESH_AXES, PARAMS, Axes, Mesh

Sizes = tuple[int, int, int, int, int]
"""The sizes of the mesh axes, in the order of ``portatrain.model.layout.MESH_AXES``."""


@dataclass(frozen=True, kw_only=True)
class LogicalTensor:
    """One parameter. ``axes``: its dimensions. The first ``batch_dims`` of them count copies (layers,
    experts); the forward pass contracts the next ``fan_in_axes`` (0: a lookup, a scale, a bias). ``matmul``: how often
    it is multiplied with every token although ``fan_in_axes`` is 0 (an output table, which is also a lookup): once, and
    once more for each further token that the model predicts."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    batch_dims: int = 0
    fan_in_axes: int = 1
    trainable: bool = True
    matmul: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Split:
    """A dimension of ``size`` that is sharded over mesh axes, given as indices into MESH_AXES."""

    axis: str
    size: int
    over: tuple[int, ...]

    def shards(self, mesh: Sizes) -> int:
        """Return the number of shards of the dimension on ``mesh``; 1 if kv_heads are held whole."""
        parts = 1
        for index in self.over:
            parts *= mesh[index]
        if self.axis == "kv_heads" and parts > self.size and parts % self.size == 0:
            return 1
        return parts

    def fits(self, mesh: Sizes) -> bool:
        return self.size % self.shards(mesh) == 0


@dataclass(frozen=True, kw_only=True)
class Group:
    """The sum of all parameters that shard alike and are used alike.

    ``layers``: the length of their stack (0: outside of any). ``active``: the numbers that a token is multiplied with
    (of a matmul, scaled by the share of the experts that the token visits, and as often as it is). ``passes``: how
    often an output table is, else 1. ``role``: the part of a layer (qkv, projected, hidden, down), or ends for
    parameters outside of layers.
    """

    params: tuple[Split, ...]
    compute: tuple[Split, ...]
    layers: int
    role: str
    numel: int
    trainable: int
    active: float
    passes: int = 1

    @property
    def routed(self) -> bool:
        """Return whether they are parameters of experts that a router chooses."""
        return {"experts", "mlp"} <= {split.axis for split in self.compute}

    def param_shards(self, mesh: Sizes) -> int:
        return math.prod(split.shards(mesh) for split in self.params)

    def compute_shards(self, mesh: Sizes) -> int:
        return math.prod(split.shards(mesh) for split in self.compute)


def group(
    tensors: Iterable[LogicalTensor],
    *,
    compute: Mapping[str, Axes] | None = None,
    params: Mapping[str, Axes] | None = None,
    experts_share: float = 1.0,
) -> tuple[Group, ...]:
    """Sum ``tensors`` by how they shard under the default mappings, overridden by the given entries.

    ``experts_share`` is experts per token / experts.
    """
    by_compute = {**COMPUTE, **(compute or {})}
    by_params = {**by_compute, **PARAMS, **(params or {})}
    sums: dict[tuple[tuple[Split, ...], tuple[Split, ...], int, str], list[float]] = {}
    for tensor in tensors:
        layers = tensor.shape[0] if tensor.batch_dims and tensor.axes[0] != "experts" else 0
        key = (_splits(tensor, by_params), _splits(tensor, by_compute), layers, _role(tensor, layers))
        multiplied = 1 if tensor.fan_in_axes > 0 else tensor.matmul
        share = experts_share if "experts" in tensor.axes[: tensor.batch_dims] else 1.0
        total = sums.setdefault(key, [0, 0, 0.0, 1])
        total[0] += tensor.size
        total[1] += tensor.size * tensor.trainable
        total[2] += tensor.size * share * multiplied
        total[3] = max(total[3], multiplied)
    return tuple(
        Group(
            params=p,
            compute=c,
            layers=layers,
            role=role,
            numel=int(n),
            trainable=int(trainable),
            active=active,
            passes=int(passes),
        )
        for (p, c, layers, role), (n, trainable, active, passes) in sums.items()
    )


def _role(tensor: LogicalTensor, layers: int) -> str:
    """Return the part of a layer that a parameter belongs to, by its input and output axes."""
    if not layers:
        return "ends"
    first = tensor.batch_dims
    taken, made = tensor.axes[first : first + tensor.fan_in_axes], tensor.axes[first + tensor.fan_in_axes :]
    if {"heads", "value_heads"} & set(taken):
        return "projected"
    if "mlp" in taken:
        return "down"
    makes = {"heads", "kv_heads", "q_rank", "kv_rank", "key_heads", "value_heads"}
    return "qkv" if makes & set(made) else "hidden"


def _splits(tensor: LogicalTensor, mapping: Mapping[str, Axes]) -> tuple[Split, ...]:
    found = []
    for axis, size in zip(tensor.axes, tensor.shape, strict=True):
        over = mapping.get(axis, ())
        names = (over,) if isinstance(over, str) else over
        if names:
            found.append(Split(axis, size, tuple(MESH_AXES.index(name) for name in names)))
    return tuple(found)


def sizes_of(mesh: Mesh) -> Sizes:
    return (mesh.replica, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)
