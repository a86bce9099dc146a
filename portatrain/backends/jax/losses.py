"""Cross-entropy over a large vocabulary, one chunk of logits at a time.

The gradient is formed in the pass that computes the loss, while a chunk's logits exist, and only scaled in the
backward pass: the three matmuls of an ordinary output layer, and memory for one chunk of logits and the gradients
of its operands. Legend: B batch, S positions, C chunk of positions, E embed, V vocab.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_BYTES = 64 << 20
"""The most that a chunk of float32 logits may take on a device."""


def chunks(batch: int, positions: int, vocab: int) -> int:
    """How many chunks the positions are cut into: the fewest that divide them and keep within CHUNK_BYTES."""
    for n in range(1, positions):
        if positions % n == 0 and batch * (positions // n) * vocab * 4 <= CHUNK_BYTES:
            return n
    return max(positions, 1)


def cross_entropy(x: Any, table_VE: Any, targets: Any, mask: Any, *, z_loss: float, softcap: float | None,
                  precision: Any, batch_shards: int = 1) -> tuple[Any, Any, Any]:  # fmt: skip
    """(sum, loss_B, weight_B); see `portatrain.ops.Ops.cross_entropy`."""
    if x.ndim == 2:  # one target a sample
        x, targets = x[:, None], targets[:, None]
        mask = mask[:, None] if mask is not None else None
    mask = jnp.ones(targets.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    n = chunks(-(-x.shape[0] // batch_shards), x.shape[1], table_VE.shape[0])
    total, loss_B = _cross_entropy((z_loss, softcap, precision, n), x, table_VE, targets, mask)
    return total, jax.lax.stop_gradient(loss_B), jnp.sum(mask, axis=1)


def _chunk(options: tuple, x_BCE: Any, table_VE: Any, targets_BC: Any, mask_BC: Any, gradients: bool) -> Any:
    """Loss of one chunk by sample, and with `gradients` those of its sum: (loss_B, dx_BCE, dtable_VE)."""
    z_loss, softcap, precision, _ = options
    z = jnp.einsum("bce,ve->bcv", x_BCE, table_VE, precision=precision, preferred_element_type=jnp.float32)
    capped = z if softcap is None else softcap * jnp.tanh(z / softcap)
    high = jnp.max(capped, axis=-1, keepdims=True)
    exps = jnp.exp(capped - high)
    sums = jnp.sum(exps, axis=-1, keepdims=True)
    lse = (jnp.log(sums) + high)[..., 0]
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2)
    hit = ids == targets_BC[..., None]
    loss_BC = lse - jnp.sum(jnp.where(hit, capped, 0.0), axis=-1) + z_loss * lse * lse
    loss_B = jnp.sum(loss_BC * mask_BC, axis=1)
    if not gradients:
        return loss_B
    dz = (exps / sums) * (1 + 2 * z_loss * lse)[..., None] - hit
    if softcap is not None:
        dz = dz * (1 - (capped / softcap) ** 2)
    dz = (dz * mask_BC[..., None]).astype(x_BCE.dtype)
    dx = jnp.einsum("bcv,ve->bce", dz, table_VE, precision=precision, preferred_element_type=x_BCE.dtype)
    dtable = jnp.einsum("bcv,bce->ve", dz, x_BCE, precision=precision, preferred_element_type=jnp.float32)
    return loss_B, dx, dtable


def _cut(array: Any, n: int) -> Any:
    """(B, S, ...) -> (n, B, S/n, ...)."""
    b, s = array.shape[:2]
    return jnp.moveaxis(array.reshape(b, n, s // n, *array.shape[2:]), 1, 0)


def _cut_all(n: int, *arrays: Any) -> tuple:
    return tuple(_cut(a, n) for a in arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    options: tuple, x_BSE: Any, table_VE: Any, targets_BS: Any, mask_BS: Any
) -> tuple[Any, Any]:
    n = options[-1]
    if n == 1:
        loss_B = _chunk(options, x_BSE, table_VE, targets_BS, mask_BS, False)
    else:

        def body(loss_B: Any, cut: Any) -> Any:
            x, targets, mask = cut
            return loss_B + _chunk(options, x, table_VE, targets, mask, False), None

        start = jnp.zeros(x_BSE.shape[0], jnp.float32)
        loss_B, _ = jax.lax.scan(body, start, _cut_all(n, x_BSE, targets_BS, mask_BS))
    return jnp.sum(loss_B), loss_B


def _forward(options: tuple, x_BSE: Any, table_VE: Any, targets_BS: Any, mask_BS: Any) -> Any:
    n = options[-1]
    if n == 1:
        loss_B, dx, dtable = _chunk(options, x_BSE, table_VE, targets_BS, mask_BS, True)
    else:

        def body(so_far: Any, cut: Any) -> Any:
            x, targets, mask = cut
            loss_B, dx, dtable = _chunk(options, x, table_VE, targets, mask, True)
            return (so_far[0] + loss_B, so_far[1] + dtable), dx

        start = (jnp.zeros(x_BSE.shape[0], jnp.float32), jnp.zeros(table_VE.shape, jnp.float32))
        (loss_B, dtable), dx = jax.lax.scan(body, start, _cut_all(n, x_BSE, targets_BS, mask_BS))
        dx = jnp.moveaxis(dx, 0, 1).reshape(x_BSE.shape)
    return (jnp.sum(loss_B), loss_B), (dx, dtable.astype(table_VE.dtype))


def _backward(options: tuple, saved: Any, given: Any) -> Any:
    dx, dtable = saved
    g = given[0]  # loss_B carries no gradient
    return (dx * g).astype(dx.dtype), (dtable * g).astype(dtable.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
