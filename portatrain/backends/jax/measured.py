"""Measure activations in jax (`model/measured.py`). Arrays are global, and the compiler distributes sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends import kernels
from portatrain.backends.jax.attention import Cut, visible
from portatrain.backends.jax.sharding_constraints import plain
from portatrain.model.measured import Measures

RUN = 64
"""The most terms that are added one after another, as XLA on a CPU does."""


class Measured(Measures):
    """The part of `JaxOps` that measures."""

    measured: bool
    _precision: Any
    _shards: Callable[..., Any]

    @property
    def _measured(self) -> bool:
        return self.measured

    @staticmethod
    def _floats(x: Any) -> bool:
        return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)

    def _squares(self, arrays: list[Any]) -> Any:
        total = sum(_total(jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))) for x in arrays)
        return jnp.stack([total, jnp.float32(sum(x.size for x in arrays))])[None, None]

    def _peaks(self, x: Any) -> Any:
        x = jax.lax.stop_gradient(plain(x))
        return jnp.max(x, axis=tuple(range(x.ndim - 1)))[None, None].astype(jnp.float32)

    def logits(self, q_BSHD: Any, k_BTKD: Any, options: Mapping[str, Any]) -> None:
        """Measure the largest logit of a call of attention."""
        if self.measures:
            q, k = (jax.lax.stop_gradient(x) for x in (q_BSHD, k_BTKD))
            top = _largest_logit(q, k, self._shards("batch", "heads", "seq"), self._precision, **options)
            self._measure("logit", self.path, top[None, None, None], "peaks")


def _total(x: Any) -> Any:
    """Return the sum of x. Long sums are taken in runs, with a barrier between them, because XLA would merge them."""
    while x.ndim:
        n = x.shape[-1]
        run = next((r for r in range(min(RUN, n), 1, -1) if n % r == 0), n)
        if n > RUN and run < n:
            x = x.reshape(*x.shape[:-1], n // run, run)
        x = jax.lax.optimization_barrier(jnp.sum(x, axis=-1))
    return x


def _largest_logit(
    q_BSHD: Any,
    k_BTKD: Any,
    shards: tuple[int, int, int],
    precision: Any,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Any = None,
    positions: Any = None,
    prefix: Any = None,
    **_: Any,
) -> Any:
    """Return () float32, the largest logit of a query and a key that it sees; -inf if no query sees a key.

    Logits exist for one chunk of queries at a time; a chunk takes an equal share of every shard of the queries.
    Letters: B batch, S queries, T keys, K kv_heads, G query heads of one, D head_dim.
    """
    (b, s, h, d), (t, kv_heads) = q_BSHD.shape, k_BTKD.shape[1:3]
    rows, heads, parts = shards
    parts = 1 if s % parts else parts
    n = kernels.chunks(-(-b // rows), -(-h // heads), s // parts, t)
    q_BSKGD = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d)
    at_q, at_k = positions if positions is not None else (jnp.arange(s), jnp.arange(t))
    of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)

    def top(so_far: Any, cut: tuple[Any, Any, Any]) -> tuple[Any, None]:
        q, at, of = cut
        logits = jnp.einsum("bskgd,btkd->bkgst", q, k_BTKD, precision=precision, preferred_element_type=jnp.float32)
        mask = visible(at, at_k, of, of_k, causal=causal, window=window, prefix=prefix)
        if mask is not None:
            logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
        return jnp.maximum(so_far, jnp.max(logits)), None

    least = jnp.float32(-jnp.inf)
    if n == 1:
        found, _none = top(least, (q_BSKGD, at_q, of_q))
    else:
        cut = Cut(n, parts)
        xs = cut.into(q_BSKGD, 1), cut.into(at_q, at_q.ndim - 1), None if of_q is None else cut.into(of_q, 1)
        found, _none = jax.lax.scan(top, least, xs)
    return found * (d**-0.5 if scale is None else scale)
