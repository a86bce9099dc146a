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
    q_BSKGD = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d)
    scores = jnp.einsum(
        "bskgd,btkd->bkgst", q_BSKGD, k_BTKD, precision=precision, preferred_element_type=jnp.float32
    ) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = visible(s, t, causal=causal, window=window, segment_ids=segment_ids, positions=positions)
    if mask is not None:
        mask = mask[:, None, None]
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None and positions is not None:
        # Only with free positions may a query see nothing: in place, it sees itself at least.
        weights = jnp.where(mask, weights, 0.0)
    out = jnp.einsum(
        "bkgst,btkd->bskgd", weights.astype(v_BTKD.dtype), v_BTKD, precision=precision,
        preferred_element_type=v_BTKD.dtype,
    )  # fmt: skip
    return out.reshape(b, s, h, d)
