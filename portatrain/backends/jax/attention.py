"""Attention in plain XLA operations. Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def visible(
    s: int,
    t: int,
    *,
    causal: bool,
    window: int | None,
    segment_ids: Any | tuple[Any, Any] | None,
    positions: tuple[Any, Any] | None,
) -> Any | None:
    """A boolean mask that broadcasts to (B, S, T), True where a query sees a key; None where it sees all."""
    mask = None
    if causal or window is not None:
        at_q, at_k = positions if positions is not None else (jnp.arange(s), jnp.arange(t))
        behind = at_q[..., :, None] - at_k[..., None, :]
        if causal:
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        elif window is not None:
            mask = jnp.abs(behind) < window
        mask = mask if mask is None or mask.ndim == 3 else mask[None]
    if segment_ids is not None:
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        same = of_q[:, :, None] == of_k[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def attention(
    q_BSHD: Any,
    k_BTKD: Any,
    v_BTKD: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Any | tuple[Any, Any] | None = None,
    positions: tuple[Any, Any] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: Any = None,
) -> Any:
    """See `portatrain.ops.Ops.attention`."""
    b, s, h, d = q_BSHD.shape
    t, kv_heads = k_BTKD.shape[1:3]
    # Heads first, so that no array of scores is ever transposed: q, k, v and the result are smaller.
    q_BKGSD = jnp.einsum("bskgd->bkgsd", q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d))
    k_BKTD, v_BKTD = (jnp.swapaxes(x, 1, 2) for x in (k_BTKD, v_BTKD))
    scores = jnp.einsum(
        "bkgsd,bktd->bkgst", q_BKGSD, k_BKTD, precision=precision, preferred_element_type=jnp.float32
    ) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = visible(s, t, causal=causal, window=window, segment_ids=segment_ids, positions=positions)
    if mask is not None:
        mask = mask[:, None, None]
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = softmax(scores)
    if mask is not None and (positions is not None or isinstance(segment_ids, tuple)):
        # Only then may a query see nothing: in place, it sees itself at least.
        weights = jnp.where(mask, weights, 0.0)
    out_BKGSD = jnp.einsum(
        "bkgst,bktd->bkgsd", weights.astype(v_BKTD.dtype), v_BKTD, precision=precision,
        preferred_element_type=v_BKTD.dtype,
    )  # fmt: skip
    return jnp.einsum("bkgsd->bskgd", out_BKGSD).reshape(b, s, h, d)


@jax.custom_jvp
def softmax(x: Any) -> Any:
    """Over the last axis. `jax.nn.softmax` keeps the exponentials for its backward pass, and the result too."""
    exps = jnp.exp(x - jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True)))
    return exps / jnp.sum(exps, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    y, (dx,) = softmax(*primals), tangents
    return y, y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))
