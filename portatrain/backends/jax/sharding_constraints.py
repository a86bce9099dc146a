"""Tell XLA's partitioner how values and parameters are sharded over the mesh.

The partitioner chooses a sharding for every value without a constraint, and its choice is not always the cheapest. It
may all-gather a weight although the activation is smaller, or all-reduce a sum of which each device keeps only a part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from portatrain.backends import choose_kernel
from portatrain.backends.jax.attention import Shards, case_of
from portatrain.backends.jax.losses import Cut
from portatrain.backends.jax.low_precision import SMALL_TABLES, rows
from portatrain.backends.jax.per_device import run_per_device
from portatrain.backends.kernels import Site
from portatrain.model.attention_rules import head_share
from portatrain.model.layout import BATCH_MESH_AXES, Layout, Spec
from portatrain.model.module import Constant, TensorInfo


def plain(x: Any) -> Any:
    """Return the array of an nnx.Variable; return anything else unchanged."""
    return x.get_value() if isinstance(x, nnx.Variable) else x


def partition_spec(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(dim or None for dim in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(p: Any, used: NamedSharding, stored: NamedSharding) -> Any:
    """All-gather `p` over fsdp for use; its gradient is reduce-scattered to the stored sharding. A sharding constraint
    alone would give the gradient the sharding in use, and so all-reduce it."""
    return jax.lax.with_sharding_constraint(p, used)


gathered.defvjp(
    lambda p, used, stored: (jax.lax.with_sharding_constraint(p, used), None),
    lambda used, stored, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)


class OnMesh:
    """Implement the part of `JaxOps` that knows the mesh. Without a mesh every value is unchanged."""

    layout: Layout | None
    devices: jax.sharding.Mesh | None
    site: Site

    def _spec(self, p: Any, role: str) -> Spec:
        """Return the mesh axes of every dimension of a parameter, for one layer of its Stacks; () if the parameter is
        unknown."""
        axes = p.get_metadata().get("axes")
        if self.layout is None or self.devices is None or axes is None:
            return ()
        info = TensorInfo(
            name="a parameter",
            role="params",
            shape=tuple(plain(p).shape),
            axes=axes,
            batch_dims=0,
            fan_in_axes=0,
            init=Constant(value=0.0),
        )
        return self.layout.tensor_spec(info, role=role)

    def _named(self, spec: Spec) -> NamedSharding:
        assert self.devices is not None
        return NamedSharding(self.devices, partition_spec(spec))

    def _split(self, letters: Sequence[str], operands: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Return the letters of a contraction that a parameter's layout shards, with their mesh axes. Letters over mesh
        axes that shard the batch are left out."""
        found: dict[str, tuple[str, ...]] = {}
        for its, p in zip(letters, operands, strict=True):
            if isinstance(p, nnx.Param):
                split = zip(its, self._spec(p, "compute"), strict=False)
                found |= {k: over for k, over in split if over and not set(over) & set(BATCH_MESH_AXES)}
        return found

    def _along(self, x: Any, letters: str, split: Mapping[str, tuple[str, ...]]) -> Any:
        """Shard `x` and its gradient along the letters that the parameter of its contraction is sharded along. Without
        this the compiler may give the gradient the sharding of the residual stream, and gather the weight instead."""
        if not set(letters) & set(split):
            return x
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(*(split.get(letter, free) for letter in letters))
        assert self.devices is not None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.devices, spec))

    def _gathering(self, p: Any) -> tuple[NamedSharding | None, NamedSharding | None]:
        """Return the shardings of a parameter as used and as stored; (None, None) if they are the same."""
        used, stored = self._spec(p, "compute"), self._spec(p, "params")
        return (None, None) if used == stored else (self._named(used), self._named(stored))

    def _finder(self, p: Any, ids: Any) -> Callable[[Any, Any], Any]:
        """Return a function that looks rows up in a table that keeps its stored sharding: the rows are exchanged,
        because they are smaller. Over the mesh axes of the vocabulary each device adds the rows that it has. Over those
        of the features, each device looks up rows for all samples of the group, and an all-to-all deals them out."""
        if self.layout is None or self.devices is None or not isinstance(p, nnx.Param) or ids.ndim != 2:
            return rows
        batch, seq = (self.layout.spec((axis,))[0] for axis in ("batch", "seq"))
        if any(n % self.layout.mesh.over(axes) for n, axes in zip(ids.shape, (batch, seq), strict=True)):
            return rows
        if ids.shape[0] * plain(p).size <= SMALL_TABLES:
            return rows
        stored = self._spec(p, "params") or ((), ())
        others = tuple(axis for axis in batch if axis not in stored[1])
        laid = jax.lax.with_sharding_constraint

        def find(table: Any, ids: Any) -> Any:
            found = rows(laid(table, self._named(stored)), laid(ids, self._named((others, seq))))
            return laid(laid(found, self._named((others, seq, stored[1]))), self._named((batch, seq, ())))

        return find

    def _attended(
        self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, precision: Any, name: str | None, **options: Any
    ) -> Any:
        """Run the kernel of attention that the table chooses, on values that are sharded over the mesh, and name what
        its backward pass needs `name` for the policies of remat."""
        h, kv_heads = q_BSHD.shape[2], k_BTKD.shape[2]
        shards = self._shards("batch", "heads", "seq")
        even = head_share(h, kv_heads, shards[1]) > 0
        case = case_of(q_BSHD, k_BTKD, v_BTKD, site=self.site, shards=shards, even_heads=even, **options)
        kernel = choose_kernel.choose("attention", case).kernel
        run = functools.partial(kernel.load(), precision=precision)
        if kernel.per_device:
            run = functools.partial(run, device=self.site.device, kept=name)
            return run_per_device(run, q_BSHD, k_BTKD, v_BTKD, layout=self.layout, devices=self.devices, **options)
        out = self._attended_by_partitioner(run, q_BSHD, k_BTKD, v_BTKD, shards=shards, **options)
        return out if name is None else checkpoint_name(out, name)

    def _attended_by_partitioner(
        self, run: Callable[..., Any], q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, shards: Shards, **options: Any
    ) -> Any:
        """Run a kernel of plain operations, which XLA's partitioner distributes over the mesh."""
        rows, heads, parts = shards
        b, s = q_BSHD.shape[:2]
        segments = options.get("segment_ids")
        in_place = k_BTKD.shape[1] == s and options.get("positions") is None and not isinstance(segments, tuple)
        if self.layout is None or self.devices is None or parts == 1 or b % rows or s % parts or not in_place:
            return run(q_BSHD, k_BTKD, v_BTKD, shards=shards, **options)
        batch, seq, kv, split = (self.layout.spec((axis,))[0] for axis in ("batch", "seq", "kv_heads", "heads"))
        kv = () if k_BTKD.shape[2] % self.layout.mesh.over(kv) else kv
        used, stored = self._named((batch, (), kv, ())), self._named((batch, seq, kv, ()))
        # Every part of the positions becomes a sample of its own, with the keys and values of all positions. So a
        # device sums their gradients over all chunks of its queries and sends them once, and not after every chunk.
        k_BTKD, v_BTKD = (gathered(x, used, stored) for x in (k_BTKD, v_BTKD))

        def lies(x: Any, *dims: tuple[str, ...]) -> Any:
            spec = (seq + batch, (), *dims)
            return jax.lax.with_sharding_constraint(x, self._named(spec[: x.ndim]))

        def cut(x: Any) -> Any:
            """Reshape (B, S, ...) to (P B, S/P, ...)."""
            x = x.reshape(b, parts, s // parts, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0).reshape(parts * b, s // parts, *x.shape[3:])

        def whole(x: Any) -> Any:
            """Repeat (B, T, ...) as (P B, T, ...)."""
            return jnp.broadcast_to(x, (parts, *x.shape)).reshape(parts * b, *x.shape[1:])

        of = None if segments is None else (cut(segments), whole(segments))
        at = cut(jnp.broadcast_to(jnp.arange(s), (b, s))), jnp.arange(s)
        q_QSHD, k_QTKD, v_QTKD = lies(cut(q_BSHD), split), lies(whole(k_BTKD), kv), lies(whole(v_BTKD), kv)
        if (prefix := options.get("prefix")) is not None:
            options["prefix"] = whole(prefix)
        shards = rows * parts, heads, 1
        options |= {"segment_ids": of, "positions": at, "may_be_blind": False}
        out = lies(run(q_QSHD, k_QTKD, v_QTKD, shards=shards, **options), split)
        return jnp.moveaxis(out.reshape(parts, b, s // parts, *out.shape[2:]), 0, 1).reshape(b, s, *out.shape[2:])

    def _shards(self, *axes: str) -> Any:
        """Return the number of shards of each logical axis of a value."""
        if self.layout is None:
            return (1,) * len(axes)
        return tuple(self.layout.mesh.over(self.layout.spec((axis,))[0]) for axis in axes)

    def _cut(self, table_VE: Any) -> Cut:
        """Return how the tokens of a loss and its table are sharded over the devices."""
        if self.layout is None or self.devices is None:
            return Cut()
        batch, seq, vocab = (self.layout.spec((axis,))[0] for axis in ("batch", "seq", "vocab"))
        if plain(table_VE).shape[0] % self.layout.mesh.over(vocab):
            vocab = ()
        rows, parts = self.layout.mesh.over(batch), self.layout.mesh.over(seq)
        kept = self._spec(table_VE, "params") if isinstance(table_VE, nnx.Param) else ()
        stored = self._named(kept) if kept else None
        return Cut(rows, parts, self._named((vocab, ())), self._named((batch, seq, vocab, ())), stored)
