"""Run a kernel that computes on the arrays of one device, on a mesh.

Every device has its samples, its heads and its share of the queries, and gathers the keys and values of all positions
over the mesh axes that shard them. Their gradients are reduce-scattered back. Under a mask by position every device
exchanges a half of its queries, so that all have as much to do (`model/context_chunks.py`). Legend as in
`attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from portatrain.model.attention_rules import head_share
from portatrain.model.context_chunks import dealt, in_order
from portatrain.model.layout import Layout


def run_per_device(
    kernel: Callable[..., Any],
    q_BSHD: Any,
    k_BTKD: Any,
    v_BTKD: Any,
    *,
    layout: Layout | None,
    devices: jax.sharding.Mesh | None,
    segment_ids: Any | tuple[Any, Any] | None = None,
    sinks: Any | None = None,
    **options: Any,
) -> Any:
    """Return what `kernel` computes, (B, S, H, D), sharded as the layout shards queries. Batch, queries and heads must
    divide over their devices; `head_share` says which heads do."""
    of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if devices is None or layout is None:
        ids = None if of_q is None else (of_q, of_k)
        return kernel(q_BSHD, k_BTKD, v_BTKD, segment_ids=ids, sinks=sinks, **options)
    mesh = layout.mesh
    batch, seq, split, kv = (layout.spec((axis,))[0] for axis in ("batch", "seq", "heads", "kv_heads"))
    parts, (h, kv_heads) = mesh.over(seq), (q_BSHD.shape[2], k_BTKD.shape[2])
    whole = k_BTKD.shape[1] % parts != 0
    kept = () if whole else seq  # the mesh axes that shard the keys
    own = kv == split and kv_heads % mesh.over(kv) == 0
    kv = kv if own else ()
    s = q_BSHD.shape[1]
    shares = in_order(parts, s)
    if k_BTKD.shape[1] == s:
        shares = dealt(parts, s, causal=options.get("causal", True), window=options.get("window"))
    exchanges = len(shares[0]) == 2

    def exchanged(x: Any) -> Any:
        """Exchange the second half of the positions, axis 1, with device n-1-r."""
        if x is None or not exchanges:
            return x
        half = x.shape[1] // 2
        pairs = [(r, parts - 1 - r) for r in range(parts)]
        return jnp.concatenate([x[:, :half], jax.lax.ppermute(x[:, half:], seq, pairs)], axis=1)

    def run(q: Any, k: Any, v: Any, sinks: Any, of_q: Any, of_k: Any) -> Any:
        if kept and parts > 1:
            k, v, of_k = (x if x is None else jax.lax.all_gather(x, kept, axis=1, tiled=True) for x in (k, v, of_k))
        if not own and (share := head_share(h, kv_heads, mesh.over(split))) < kv_heads:
            first = jax.lax.axis_index(split) * q.shape[2] * kv_heads // h
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, share, axis=2) for x in (k, v))
        index = jax.lax.axis_index(seq) if parts > 1 else 0
        ids = None if of_q is None else (exchanged(of_q), of_k)
        return exchanged(kernel(exchanged(q), k, v, segment_ids=ids, sinks=sinks, part=(index, shares), **options))

    at_q, at_k = _spec(batch, seq, split), _spec(batch, kept, kv)
    at_sinks = None if sinks is None else _spec(split)
    ids_q, ids_k = (None, None) if of_q is None else (_spec(batch, seq), _spec(batch, kept))
    mapped = jax.shard_map(
        run, mesh=devices, in_specs=(at_q, at_k, at_k, at_sinks, ids_q, ids_k), out_specs=at_q, check_vma=False
    )
    return mapped(q_BSHD, k_BTKD, v_BTKD, sinks, of_q, of_k)


def _spec(*dims: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(dim or None for dim in dims))
