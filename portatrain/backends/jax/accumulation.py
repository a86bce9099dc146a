"""Sum the gradients of a step's microbatches.

Every microbatch sums its gradients over the mesh axes that shard its samples or positions, with one exception: over
`replica`, where no parameter is sharded, they are summed once a step. Each replica keeps the sums of its own samples,
(R, ...) with R sharded over `replica`, which takes no more memory than sums that are equal on all replicas. XLA cannot
do this by itself, as the sum over samples is one number to it wherever the samples are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from portatrain.backends.jax.sharding_constraints import partition_spec
from portatrain.model.across_samples import Across
from portatrain.model.layout import Layout
from portatrain.model.ops import Loss

REPLICA = "replica"

Sums = tuple[Any, Any, Any, Any, Any]
"""(gradients by name, loss, weight, auxes, tallies), all summed."""


class Microbatch(Protocol):
    def __call__(self, micro: Any, across: Across, layout: Layout, /) -> Any:
        """Return what a microbatch whose arrays `layout` shards adds to the sums, or the values that it compares."""


def of_one_replica(layout: Layout) -> Layout | None:
    """Return the layout of the samples of one replica; None if there is only one, or if more than the samples is
    sharded over `replica`."""
    batch = layout.spec(("batch",))[0]
    over = [layout.spec((axis,))[0] for axis in layout.compute if axis != "batch"]
    over += [
        (axes,) if isinstance(axes, str) else tuple(axes) for axis, axes in layout.params.items() if axis != "batch"
    ]
    if layout.mesh.replica == 1 or batch[:1] != (REPLICA,) or any(REPLICA in axes for axes in over):
        return None
    rest = {"batch": batch[1:]}
    return dataclasses.replace(layout, compute={**layout.compute, **rest}, params={**layout.params, **rest})


@dataclasses.dataclass(frozen=True)
class Accumulation:
    """Sums over microbatches. one, compared: what a microbatch adds, and the values that its model compares across
    samples. layout: the layout of the whole batch. stored: the sharding of each gradient."""

    one: Microbatch
    compared: Microbatch
    layout: Layout
    devices: jax.sharding.Mesh
    stored: Mapping[str, PartitionSpec]

    def __call__(self, batch: Mapping[str, Any]) -> Sums:
        """Return the sums over `batch`, whose arrays are (microbatches, samples, ...)."""
        n = next(iter(batch.values())).shape[0]
        first = _first(batch)
        if n == 1:
            return self._whole(first, Across())
        if (mine := of_one_replica(self.layout)) is not None:
            across = Across(microbatches=n)
            split = self._by_replica(batch, mine)
            shapes = jax.eval_shape(lambda micro: self._replicas(micro, across, mine), _first(split))
            if not across.wanted:
                sums = _scan(lambda micro, across: self._replicas(micro, across, mine), shapes, split, n, None)
                return self._over_replicas(sums)
        across = Across(microbatches=n)
        shapes = jax.eval_shape(lambda micro: self._whole(micro, across), first)
        held = None
        if across.wanted:
            # If the model compares samples, what it compares is first collected from every microbatch.
            held = jax.lax.map(lambda micro: self._collected(micro, n), batch)
            whole = Across(microbatches=n, held=held)
            shapes = jax.eval_shape(lambda micro: self._whole(micro, whole), first)
        return _scan(self._whole, shapes, batch, n, held)

    def _whole(self, micro: Any, across: Across) -> Sums:
        sums: Sums = self.one(micro, across, self.layout)
        return sums

    def _collected(self, micro: Any, n: int) -> list[Any]:
        across = Across(microbatches=n, collecting=True)
        self.compared(micro, across, self.layout)
        return across.found

    # ---- one sum for each replica

    def _laid(self, x: Any, *spec: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.devices, PartitionSpec(*spec)))

    def _by_replica(self, batch: Mapping[str, Any], mine: Layout) -> dict[str, Any]:
        """Reshape (n, B, ...) to (n, R, B/R, ...)."""
        rows, r = partition_spec(mine.spec(("batch",))), self.layout.mesh.replica
        free = PartitionSpec.UNCONSTRAINED
        return {
            k: self._laid(
                x.reshape(x.shape[0], r, x.shape[1] // r, *x.shape[2:]), None, REPLICA, *rows, *[free] * (x.ndim - 2)
            )
            for k, x in batch.items()
        }

    def _replicas(self, micro: Any, across: Across, mine: Layout) -> Sums:
        """Return the sums of a microbatch, each as (R, ...)."""
        each = jax.vmap(lambda micro: self.one(micro, across, mine), spmd_axis_name=REPLICA)
        grads, *rest = each(micro)
        free = PartitionSpec.UNCONSTRAINED
        grads = {name: self._laid(g, REPLICA, *self.stored[name]) for name, g in grads.items()}
        rest = jax.tree.map(lambda x: self._laid(x, REPLICA, *[free] * (x.ndim - 1)), rest)
        return (grads, *rest)

    def _over_replicas(self, sums: Sums) -> Sums:
        grads, total, weight, auxes, tallies = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.max(x, axis=0) if _is_max(path) else jnp.sum(x, axis=0), sums
        )
        return {name: self._laid(g, *self.stored[name]) for name, g in grads.items()}, total, weight, auxes, tallies


def _first(batch: Any) -> Any:
    return jax.tree.map(lambda a: a[0], batch)


def _scan(one: Callable[[Any, Across], Sums], shapes: Any, batch: Any, n: int, held: Any) -> Sums:
    def body(so_far: Any, given: Any) -> Any:
        index, micro = given
        return _join(so_far, one(micro, Across(microbatches=n, index=index, held=held))), None

    sums, _ = jax.lax.scan(body, _start(shapes), (jnp.arange(n, dtype=jnp.int32), batch))
    return sums


def _is_max(path: Any) -> bool:
    return bool(path) and getattr(path[-1], "key", None) == "max"


def _join(a: Any, b: Any) -> Any:
    """Accumulate two microbatches: add everything, except that auxes of maxima keep the larger value."""
    grads = jax.tree.map(jnp.add, a[0], b[0])
    auxes = jax.tree_util.tree_map_with_path(lambda p, x, y: jnp.maximum(x, y) if _is_max(p) else x + y, a[3], b[3])
    return grads, a[1] + b[1], a[2] + b[2], auxes, jax.tree.map(jnp.add, a[4], b[4])


def _start(shapes: Any) -> Any:
    # Sums are float32, whatever the dtype of their terms.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32 if s.dtype == jnp.bfloat16 else s.dtype), shapes)
    auxes = jax.tree_util.tree_map_with_path(lambda p, z: jnp.full(z.shape, -jnp.inf) if _is_max(p) else z, zeros[3])
    return (*zeros[:3], auxes, zeros[4])


def summed(loss: Loss, auxes: Mapping[str, Any]) -> Any:
    """Return the summed loss with the auxiliary losses, whose samples count by their weights."""
    total = loss.sum
    for aux in auxes.values():
        if aux.loss:
            total = total + aux.loss * jnp.sum(aux.value_B * jax.lax.stop_gradient(loss.weight_B))
    return total


def aux_part(aux: Any) -> dict[str, Any]:
    """Return the part of an aux that is accumulated. The kind of reduction is in the key, because it must be static."""
    count = jnp.float32(aux.count * aux.value_B.shape[0])
    if aux.reduce == "max":
        return {"max": jnp.max(aux.value_B)}
    if aux.reduce == "peaks":
        return {"max": jnp.max(aux.value_B, axis=0)}
    if aux.reduce == "layers":
        return {"layers": jnp.sum(aux.value_B, axis=0), "count": jnp.float32(aux.value_B.shape[0])}
    return {"sum": jnp.sum(aux.value_B)} | ({"count": count} if aux.reduce == "mean" else {})


def aux_value(part: dict[str, Any]) -> Any:
    """Return the metric of an accumulated part."""
    if "layers" in part:
        return part["layers"] / part["count"]
    return part["max"] if "max" in part else part["sum"] / part.get("count", 1.0)
