"""Implement attention of `Ops` on DTensors.

Documented choices: keys and values are gathered over context. Under a mask by position every process exchanges a half
of its queries, so that all have as much to do (`model/context_chunks.py`), and leaves out the keys that no query of a
chunk sees. If there are fewer kv_heads than tensor shards, every process of the axis computes all of them and keeps
those that its queries read. Legend: see `portatrain.model.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from portatrain.backends.torch.mesh_values import Exchanged
from portatrain.model.attention_rules import slopes_of
from portatrain.model.context_chunks import Chunks, dealt, keys_of

Placements = Sequence[Placement]


class MeshAttention:
    """Implement `attention` of `MeshOps`; `MeshOps` has the helpers."""

    parts: Any
    world: Any
    axes: Any
    weight: Callable[[Any], Any]
    _value: Callable[[Any], Any]
    _local: Callable[..., Tensor]
    _from: Callable[..., Any]
    _kept: Callable[..., Any]
    arange: Callable[[int], Tensor]

    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        """Compute the queries of this process over all keys. See the top of this file."""
        q, k, v = self._value(q_BSHD), self._value(k_BTKD), self._value(v_BTKD)
        heads, kv_heads = q.shape[2], k.shape[2]
        at_q: list[Placement] = []
        at_k: list[Placement] = []
        grads: list[Placement] = []
        take: slice | None = None
        for axis, p in zip(self.axes, q.placements, strict=True):
            size, here = self.world.mesh.sizes[axis], self.world.at[axis]
            cut = isinstance(p, Shard) and p.dim in (1, 2)
            at_q.append(p if cut else Replicate())
            if not cut:
                at_k.append(Replicate())
                grads.append(Replicate())
            elif p.dim == 1:
                at_k.append(Replicate())
                grads.append(Partial())
            elif kv_heads % size == 0:
                at_k.append(Shard(2))
                grads.append(Shard(2))
            else:
                # Every process has all kv heads and reads those of its own queries.
                at_k.append(Replicate())
                grads.append(Partial())
                per, group = heads // size, heads // kv_heads
                take = slice(here * per // group, ((here + 1) * per - 1) // group + 1)
        mine, *pair = self._local(q, at_q), self._local(k, at_k, grads), self._local(v, at_k, grads)
        if take is not None:
            pair = [x[:, :, take] for x in pair]
        options |= self._by_head(at_q, heads, options)
        chunks = self._chunks(at_q, q.shape[1], k.shape[1], options)
        if chunks is None:
            out = self.parts.attention(mine, *pair, **options | self._rule(q, at_q, k.shape[1], options))
        else:
            out = self._by_chunks(chunks, mine, *pair, **options)
        return self._from(out, at_q)

    def _by_head(self, at_q: Placements, heads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return the sinks and the slopes of ALiBi of this process's heads."""
        found: dict[str, Any] = {}
        if (sinks := options.get("sinks")) is not None:
            own: list[Placement] = [Shard(0) if isinstance(p, Shard) and p.dim == 2 else Replicate() for p in at_q]
            grads = [Partial() if isinstance(p, Shard) and p.dim == 1 else o for p, o in zip(at_q, own, strict=True)]
            found["sinks"] = self._local(self.weight(sinks), own, grads)
        if (slopes := slopes_of(options.get("alibi", False), heads)) is not None:
            found["alibi"] = slopes
            for axis, p in zip(self.axes, at_q, strict=True):
                if isinstance(p, Shard) and p.dim == 2:
                    size, here = heads // self.world.mesh.sizes[axis], self.world.at[axis]
                    found["alibi"] = slopes[here * size : (here + 1) * size]
        return found

    # ---- queries in chunks

    def _chunks(self, at_q: Placements, s: int, t: int, options: dict[str, Any]) -> Chunks | None:
        """Return the chunks that this process attends for; None if queries are not sharded over context, or if another
        rule than the order of the positions says what a query sees."""
        cut = [axis for axis, p in zip(self.axes, at_q, strict=True) if isinstance(p, Shard) and p.dim == 1]
        free = options.get("positions") is not None or options.get("prefix") is not None
        if cut != ["context"] or s != t or free or isinstance(options.get("segment_ids"), tuple):
            return None
        causal, window = options.get("causal", True), options.get("window")
        if not causal and window is None:
            return None
        return dealt(self.world.mesh.context, s, causal=causal, window=window)[self.world.at["context"]]

    def _by_chunks(self, chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Compute each chunk over the keys that some query of it sees."""
        length, causal, window = k.shape[1], options.get("causal", True), options.get("window")
        segments = options.pop("segment_ids", None)
        if segments is not None:
            whole = [Replicate() for _ in self.axes]
            segments = self._kept("segments", (segments,), lambda x: self._local(self._value(x), whole))
        if len(chunks) == 2:
            q = Exchanged.apply(q, self.world)
        made, done = [], 0
        for start, size in chunks:
            first, end = keys_of((start, size), length, causal=causal, window=window)
            rule = self._kept("chunk", (segments, q.device, start, size, first, end), _rule_of_chunk)
            rows, keys = slice(done, done + size), slice(first, end)
            made.append(self.parts.attention(q[:, rows], k[:, keys], v[:, keys], **options, **rule))
            done += size
        out = torch.cat(made, dim=1)
        return Exchanged.apply(out, self.world) if len(chunks) == 2 else out

    # ---- queries in place

    def _rule(self, q: Any, at_q: Placements, t: int, options: dict[str, Any]) -> dict[str, Any]:
        """Return local segment_ids and positions: those of this process's queries, and those of all keys."""
        cut = [isinstance(p, Shard) and p.dim == 1 for p in at_q]
        segments, positions = options.get("segment_ids"), options.get("positions")
        by_position = options.get("causal", True) or options.get("window") is not None or options.get("alibi", False)
        if positions is None and any(cut) and by_position:
            positions = self._kept("positions", (q.shape[1], t), lambda s, t: (self.arange(s), self.arange(t)))

        def local(pair: Any) -> Any:
            if pair is None:
                return None
            of_q, of_k = pair if isinstance(pair, tuple) else (pair, pair)
            return self._kept("pair", (of_q, of_k, tuple(cut)), part)

        def part(of_q: Any, of_k: Any, cut: tuple[bool, ...]) -> Any:
            of_q, of_k = self._value(of_q), self._value(of_k)
            mine = [Shard(of_q.ndim - 1) if c else Replicate() for c in cut]
            return self._local(of_q, mine), self._local(of_k, [Replicate() for _ in cut])

        prefix = options.get("prefix")
        if prefix is not None:  # which is of keys, and keys are whole
            whole = [Replicate() for _ in cut]
            prefix = self._kept("prefix", (prefix,), lambda x: self._local(self._value(x), whole))
        return {"segment_ids": local(segments), "positions": local(positions), "prefix": prefix}


def _rule_of_chunk(
    segments: Tensor | None, device: torch.device, start: int, size: int, first: int, end: int
) -> dict[str, Any]:
    """Return the positions and the segments of a chunk's queries and keys."""
    at = torch.arange(start, start + size, device=device), torch.arange(first, end, device=device)
    if segments is None:
        return {"positions": at}
    return {"positions": at, "segment_ids": (segments[:, start : start + size], segments[:, first:end])}
