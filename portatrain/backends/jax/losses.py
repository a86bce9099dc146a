"""Cross-entropy over a large vocabulary, one chunk of logits at a time.

The gradient is formed in the pass that computes the loss, while a chunk's logits exist, and only scaled in the
backward pass: the three matmuls of an ordinary output layer, and memory for one chunk of logits and the gradients
of its operands. Legend: B batch, S positions, C chunk of positions, E embed, V vocab; over devices, R parts of the
batch and P of the positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends.jax.low_precision import laid

CHUNK_BYTES = 64 << 20
"""The largest size of a chunk of float32 logits on a device, or a quarter of the table's float32 gradient if that is
larger: with smaller chunks the matmuls would wait for the table."""


def chunks(batch: int, positions: int, vocab: int, most: int | None = None) -> int:
    """Return the number of chunks of the positions: the smallest that divides them and keeps within `most` bytes."""
    for n in range(1, positions):
        if positions % n == 0 and batch * (positions // n) * vocab * 4 <= (most or CHUNK_BYTES):
            return n
    return max(positions, 1)


@dataclass(frozen=True)
class Cut:
    """How the tokens of a loss are sharded: in `rows` parts of the batch and `parts` of the sequence. `table`,
    `sums` and `stored` are shardings of the table during the computation, of the sums of its gradient, (rows, parts,
    V, E), and of the gradient; None: no constraint.

    Every part sums the gradient of its own tokens over all chunks, and the parts are added once, at the end. Without
    these constraints the compiler would add the parts after each chunk, and gather the table for each.
    """

    rows: int = 1
    parts: int = 1
    table: Any = None
    sums: Any = None
    stored: Any = None

    def of(self, batch: int, positions: int) -> Cut:
        """Return this cut, or no cut if it does not divide these sizes, as in the last batch of an evaluation."""
        divides = batch % self.rows == 0 and positions % self.parts == 0
        return self if divides else Cut(table=self.table, stored=self.stored)


def cross_entropy(
    x: Any,
    table_VE: Any,
    targets: Any,
    mask: Any,
    *,
    z_loss: float,
    softcap: float | None,
    precision: Any,
    cut: Cut = Cut(),
    merge: bool = False,
) -> tuple[Any, Any, Any]:
    """Return (sum, loss_B, weight_B); see `portatrain.model.ops.Ops.cross_entropy`. merge: make samples and positions
    one dimension in the matmuls, unless positions are sharded; see `cpu_products`."""
    if x.ndim == 2:  # one target a sample
        x, targets = x[:, None], targets[:, None]
        mask = mask[:, None] if mask is not None else None
    mask = jnp.ones(targets.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    b, s = targets.shape
    cut = cut.of(b, s)
    v = table_VE.shape[0]
    n = chunks(b // cut.rows, s // cut.parts, v, max(CHUNK_BYTES, table_VE.size))
    options = (z_loss, softcap, precision, merge and cut.parts == 1, n, cut)
    total, loss_B = _cross_entropy(options, x, table_VE, targets, mask)
    return total, jax.lax.stop_gradient(loss_B), jnp.sum(mask, axis=1)


def _chunk(options: tuple, x: Any, table_VE: Any, targets: Any, mask: Any, gradients: bool) -> Any:
    """Return the loss of one chunk (R, B, P, C, ...) by sample; with `gradients` (loss_RB, dx, dtable_RPVE) of its
    sum."""
    z_loss, softcap, precision, merged, *_ = options
    shape = targets.shape
    token, part = "rbpc", "rp"
    if merged:
        token, part = "rn", "r"
        merge = shape[0], math.prod(shape[1:])
        x, targets, mask = x.reshape(*merge, x.shape[-1]), targets.reshape(merge), mask.reshape(merge)
    einsum = partial(jnp.einsum, precision=precision)
    z = einsum(f"{token}e,ve->{token}v", x, table_VE, preferred_element_type=jnp.float32)
    capped = z if softcap is None else softcap * jnp.tanh(z / softcap)
    high = jnp.max(capped, axis=-1, keepdims=True)
    exps = jnp.exp(capped - high)
    sums = jnp.sum(exps, axis=-1, keepdims=True)
    lse = (jnp.log(sums) + high)[..., 0]
    ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    hit = ids == targets[..., None]
    loss = lse - jnp.sum(jnp.where(hit, capped, 0.0), axis=-1) + z_loss * lse * lse
    loss_RB = jnp.sum((loss * mask).reshape(shape), axis=(2, 3))
    if not gradients:
        return loss_RB
    dz = (exps / sums) * (1 + 2 * z_loss * lse)[..., None] - hit
    if softcap is not None:
        dz = dz * (1 - (capped / softcap) ** 2)
    dz = (dz * mask[..., None]).astype(x.dtype)
    dx = einsum(f"{token}v,ve->{token}e", dz, table_VE, preferred_element_type=x.dtype)
    dtable = einsum(f"{token}v,{token}e->{part}ve", dz, x, preferred_element_type=jnp.float32)
    return loss_RB, dx.reshape(*shape, x.shape[-1]), dtable.reshape(shape[0], shape[2], *table_VE.shape)


def _split(array: Any, n: int, cut: Cut) -> Any:
    """Reshape (B, S, ...) to (n, R, B/R, P, S/(P n), ...)."""
    b, s, *rest = array.shape
    array = array.reshape(cut.rows, b // cut.rows, cut.parts, n, s // cut.parts // n, *rest)
    return jnp.moveaxis(array, 3, 0)


def _split_all(n: int, cut: Cut, *arrays: Any) -> tuple:
    return tuple(_split(a, n, cut) for a in arrays)


def _axes(dim: Any, mesh: Any) -> tuple[str, ...]:
    """Return the mesh axes in one entry of a PartitionSpec that are longer than 1."""
    return tuple(a for a in ((dim,) if isinstance(dim, str) else dim or ()) if mesh.shape[a] > 1)


def _added(dtable_RPVE: Any, cut: Cut) -> Any:
    """Return the sum of the parts, (V, E), with the sharding of the stored table: a reduce-scatter, in which each
    device receives the sum of its own columns. For a constraint the compiler would all-reduce, which moves twice as
    much."""
    sums, stored = cut.sums, cut.stored
    if sums is not None and stored is not None and math.prod(dtable_RPVE.shape[:2]) > 1:
        batch, seq, vocab = (_axes(dim, sums.mesh) for dim in sums.spec[:3])
        rows, columns = (_axes(dim, sums.mesh) for dim in stored.spec)
        if rows == vocab and set(columns) <= {*batch, *seq}:

            def mine(part: Any) -> Any:
                part = part[0, 0].T  # libtpu scatters along the last dimension in whole tiles of 128 only
                for axis in columns:  # major first
                    part = jax.lax.psum_scatter(part, axis, scatter_dimension=0, tiled=True)
                rest = tuple(axis for axis in batch + seq if axis not in columns)
                return (jax.lax.psum(part, rest) if rest else part).T

            add = jax.shard_map(mine, mesh=sums.mesh, in_specs=sums.spec, out_specs=stored.spec, check_vma=False)
            return add(laid(dtable_RPVE, sums))
    return laid(jnp.sum(dtable_RPVE, axis=(0, 1)), stored)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options: tuple, x_BSE: Any, table_VE: Any, targets_BS: Any, mask_BS: Any) -> tuple[Any, Any]:
    n, cut = options[-2:]
    table_VE = laid(table_VE, cut.table)
    parts = _split_all(n, cut, x_BSE, targets_BS, mask_BS)
    if n == 1:
        loss_RB = _chunk(options, parts[0][0], table_VE, parts[1][0], parts[2][0], False)
    else:

        def body(loss_RB: Any, one: Any) -> Any:
            x, targets, mask = one
            return loss_RB + _chunk(options, x, table_VE, targets, mask, False), None

        start = jnp.zeros((cut.rows, x_BSE.shape[0] // cut.rows), jnp.float32)
        loss_RB, _ = jax.lax.scan(body, start, parts)
    loss_B = loss_RB.reshape(-1)
    return jnp.sum(loss_B), loss_B


def _forward(options: tuple, x_BSE: Any, table_VE: Any, targets_BS: Any, mask_BS: Any) -> Any:
    n, cut = options[-2:]
    kind, b = table_VE.dtype, x_BSE.shape[0]
    table_VE = laid(table_VE, cut.table)
    parts = _split_all(n, cut, x_BSE, targets_BS, mask_BS)
    if n == 1:
        loss_RB, dx, dtable = _chunk(options, parts[0][0], table_VE, parts[1][0], parts[2][0], True)
        dx = dx.reshape(x_BSE.shape)
    else:

        def body(so_far: Any, one: Any) -> Any:
            x, targets, mask = one
            loss_RB, dx, dtable = _chunk(options, x, table_VE, targets, mask, True)
            return (so_far[0] + loss_RB, so_far[1] + laid(dtable, cut.sums)), dx

        sums = laid(jnp.zeros((cut.rows, cut.parts, *table_VE.shape), jnp.float32), cut.sums)
        start = (jnp.zeros((cut.rows, b // cut.rows), jnp.float32), sums)
        (loss_RB, dtable), dx = jax.lax.scan(body, start, parts)
        dx = jnp.moveaxis(dx, 0, 3).reshape(x_BSE.shape)
    loss_B, dtable_VE = loss_RB.reshape(-1), _added(dtable, cut)
    return (jnp.sum(loss_B), loss_B), (dx, dtable_VE.astype(kind))


def _backward(options: tuple, saved: Any, given: Any) -> Any:
    dx, dtable = saved
    g = given[0]  # loss_B carries no gradient
    return (dx * g).astype(dx.dtype), (dtable * g).astype(dtable.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
