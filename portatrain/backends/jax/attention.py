"""Attention in plain XLA operations. Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim (that
of values may differ).

Scores exist for one chunk of queries at a time, forward and backward, so that memory grows with the length, not with
its square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends import choose_kernel, kernels
from portatrain.model.attention_rules import slopes_of

SITE = kernels.Site(backend="jax")
Shards = tuple[int, int, int]
"""The numbers of parts into which batch, heads and queries are cut over devices."""


def visible(
    at_q: Any, at_k: Any, of_q: Any, of_k: Any, *, causal: bool, window: int | None, prefix: Any | None = None
) -> Any | None:
    """Return a boolean mask that broadcasts to (B, S, T), True if a query sees a key; None if it sees all keys. `at`
    holds positions, (S,) or (B, S); `of` holds segments, (B, S), or None; `prefix` is that of `Ops.attention`."""
    mask = None
    if causal or window is not None:
        behind = at_q[..., :, None] - at_k[..., None, :]
        if causal:
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        elif window is not None:
            mask = jnp.abs(behind) < window
        mask = mask if mask is None or mask.ndim == 3 else mask[None]
        mask = mask if mask is None or prefix is None else mask | (prefix != 0)[:, None, :]
    if of_q is not None:
        same = of_q[:, :, None] == of_k[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def case_of(
    q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, site: kernels.Site, shards: Shards, even_heads: bool, **options: Any
) -> kernels.Case:
    """Return the case of a call of `Ops.attention`. `even_heads`: the query heads of every device use equally many kv
    heads."""
    (b, s, h, d), (t, kv_heads) = q_BSHD.shape, k_BTKD.shape[1:3]
    rows, heads, parts = shards
    uneven = {"uneven": s % parts, "uneven-batch": b % rows, "uneven-heads": not even_heads, "cross": s != t}
    traits = choose_kernel.attention_traits(options, (d, v_BTKD.shape[3]))
    return kernels.Case(
        site=site,
        dtype=q_BSHD.dtype.name,
        shape=(-(-b // rows), -(-s // parts), t, -(-h // heads), -(-kv_heads // heads), d),
        traits=traits | {trait for trait, there in uneven.items() if there},
    )


def written_out(q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, shards: Shards, **options: Any) -> Any:
    """Compute all scores at once."""
    return _in_chunks(1, 1, q_BSHD, k_BTKD, v_BTKD, **options)


def chunked(q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, shards: Shards, **options: Any) -> Any:
    """Compute the scores of one chunk of queries at a time."""
    rows, heads, parts = shards
    b, s, h, _ = q_BSHD.shape
    n = kernels.chunks(-(-b // rows), -(-h // heads), s // parts, k_BTKD.shape[1])
    return _in_chunks(n, parts, q_BSHD, k_BTKD, v_BTKD, **options)


def _in_chunks(
    n: int,
    parts: int,
    q_BSHD: Any,
    k_BTKD: Any,
    v_BTKD: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Any | tuple[Any, Any] | None = None,
    positions: tuple[Any, Any] | None = None,
    prefix: Any | None = None,
    alibi: bool | Sequence[float] = False,
    softcap: float | None = None,
    sinks: Any | None = None,
    scale: float | None = None,
    precision: Any = None,
    may_be_blind: bool | None = None,
) -> Any:
    """Compute attention in `n` chunks of queries. Each chunk takes an equal share of every one of the `parts`."""
    b, s, h, d = q_BSHD.shape
    t, kv_heads = k_BTKD.shape[1:3]
    if s == 0 or t == 0:
        return jnp.zeros((b, s, h, v_BTKD.shape[3]), q_BSHD.dtype)
    # Heads come first, so that no array of scores is transposed: q, k, v and the result are smaller.
    q_BKGSD = jnp.einsum("bskgd->bkgsd", q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d))
    k_BKTD, v_BKTD = (jnp.swapaxes(x, 1, 2) for x in (k_BTKD, v_BTKD))
    at_q, at_k = positions if positions is not None else (jnp.arange(s), jnp.arange(t))
    of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    options = {
        "causal": causal,
        "window": window,
        "prefix": prefix,
        "slopes": slopes_of(alibi, h),
        "softcap": softcap,
        "sinks": sinks,
        "precision": precision,
        "scale": d**-0.5 if scale is None else scale,
        # Only then may a query see nothing; otherwise it sees at least itself.
        "may_be_blind": positions is not None or isinstance(segment_ids, tuple)
        if may_be_blind is None
        else may_be_blind,
    }
    if n == 1:
        out_BKGSD = _seen(options, q_BKGSD, at_q, of_q, k_BKTD, at_k, of_k, v_BKTD)
    else:
        kind = q_BKGSD.dtype
        # The gradients of keys and values are summed over the chunks, in float32.
        k32, v32 = (x.astype(jnp.float32) for x in (k_BKTD, v_BKTD))

        def body(_: None, cut: tuple[Any, Any, Any]) -> tuple[None, Any]:
            q, at, of = cut
            return None, _seen(options, q, at, of, k32.astype(kind), at_k, of_k, v32.astype(kind))

        cut = Cut(n, parts)
        xs = cut.into(q_BKGSD, 3), cut.into(at_q, at_q.ndim - 1), None if of_q is None else cut.into(of_q, 1)
        _, outs = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), None, xs)
        out_BKGSD = cut.back(outs, 3)
    return jnp.einsum("bkgsd->bskgd", out_BKGSD).reshape(b, s, h, v_BTKD.shape[3])


def _seen(
    options: Mapping[str, Any], q_BKGSD: Any, at_q: Any, of_q: Any, k_BKTD: Any, at_k: Any, of_k: Any, v_BKTD: Any
) -> Any:
    """Return (B, K, G, S, D): the attention of these queries over all keys."""
    scores = options["scale"] * jnp.einsum(
        "bkgsd,bktd->bkgst", q_BKGSD, k_BKTD, precision=options["precision"], preferred_element_type=jnp.float32
    )
    if (cap := options["softcap"]) is not None:
        scores = cap * jnp.tanh(scores / cap)
    if (slopes := options["slopes"]) is not None:
        apart = jnp.abs(at_q[..., :, None] - at_k[..., None, :]).astype(jnp.float32)  # (S, T) or (B, S, T)
        each = jnp.asarray(slopes, jnp.float32).reshape(scores.shape[1], scores.shape[2], 1, 1)
        scores = scores - each * (apart if apart.ndim == 2 else apart[:, None, None])
    mask = visible(at_q, at_k, of_q, of_k, causal=options["causal"], window=options["window"], prefix=options["prefix"])
    if mask is not None:
        mask = mask[:, None, None]
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if (sinks := options["sinks"]) is None:
        weights = softmax(scores)
    else:
        sinks = sinks.astype(jnp.float32).reshape(1, scores.shape[1], scores.shape[2], 1, 1)
        weights = softmax_with_sinks(scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1)))
    if mask is not None and options["may_be_blind"]:
        weights = jnp.where(mask, weights, 0.0)
    return jnp.einsum(
        "bkgst,bktd->bkgsd",
        weights.astype(v_BKTD.dtype),
        v_BKTD,
        precision=options["precision"],
        preferred_element_type=v_BKTD.dtype,
    )


class Cut:
    """Cut an axis into `n` chunks. Each chunk takes an equal share of every one of the `parts` on other devices."""

    def __init__(self, n: int, parts: int) -> None:
        self.n, self.parts = n, parts

    def into(self, x: Any, axis: int) -> Any:
        """Reshape (..., S, ...) to (n, ..., S/n, ...)."""
        shape, each = x.shape, x.shape[axis] // (self.n * self.parts)
        x = x.reshape(*shape[:axis], self.parts, self.n, each, *shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0).reshape(self.n, *shape[:axis], self.parts * each, *shape[axis + 1 :])

    def back(self, x: Any, axis: int) -> Any:
        """Reshape (n, ..., S/n, ...) to (..., S, ...)."""
        shape, each = x.shape[1:], x.shape[axis + 1] // self.parts
        x = x.reshape(self.n, *shape[:axis], self.parts, each, *shape[axis + 1 :])
        return jnp.moveaxis(x, 0, axis + 1).reshape(*shape[:axis], self.n * shape[axis], *shape[axis + 1 :])


@jax.custom_jvp
def softmax(x: Any) -> Any:
    """Return the softmax over the last axis. `jax.nn.softmax` also keeps the exponentials for its backward pass."""
    exps = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)))
    return exps / jnp.sum(exps, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))


@jax.custom_jvp
def softmax_with_sinks(x: Any, sinks: Any) -> Any:
    """Return exp(x) / (exp(sinks) + sum of exp(x)) over the last axis; `sinks` has size 1 there."""
    return _with_sinks(x, sinks)[0]


def _with_sinks(x: Any, sinks: Any) -> tuple[Any, Any]:
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(x, axis=-1, keepdims=True), sinks))
    exps, beside = jnp.exp(x - top), jnp.exp(sinks - top)
    total = jnp.sum(exps, axis=-1, keepdims=True) + beside
    return exps / total, beside / total


@softmax_with_sinks.defjvp
def _softmax_with_sinks_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (y, beside), (dx, dsinks) = _with_sinks(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True) - beside * dsinks)
