"""Mixtures of experts in JAX, on one device and under `jax.shard_map` on a mesh.

A device sorts its tokens by expert. Over the mesh axes that shard experts it exchanges the rows: each device gets the
rows of its experts, computes, and sends the results back. Every shape is static, so the buffer of what a device may get
has room for all rows of all devices of the exchange; no row is ever dropped. Legend as in `model/ops_experts.py`; n
tokens and Y experts of one device, R devices of an exchange.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from portatrain.backends import choose_kernel
from portatrain.backends.kernels import Case
from portatrain.errors import UserError
from portatrain.model.layout import Layout, Spec
from portatrain.model.lora import Factored, factored, not_adapted
from portatrain.model.ops_checks import check_quiet, recorded
from portatrain.model.ops_experts import check_body, check_experts, check_grouped, outside

Exchange = tuple[str, ...]


@dataclasses.dataclass
class Rows:
    """What the operations of a body know. sizes_X: the number of rows of each expert of this device. split: by id of a
    param, the mesh axes that shard its axes after that of the experts. unsummed: by id of a completed sum over mesh
    axes, this device's part of it and the axes."""

    sizes_X: Any
    split: dict[int, Spec]
    unsummed: dict[int, tuple[Any, Any, tuple[str, ...]]] = dataclasses.field(default_factory=dict)

    def of(self, p: Any) -> Spec:
        return self.split.get(id(p), ((),) * (p.ndim - 1))

    def completed(self, part: Any, over: tuple[str, ...]) -> Any:
        """Return the sum of `part` over mesh axes. If a body returns it as it is, the part is used, and the sum, which
        nothing uses then, is not computed."""
        if not over:
            return part
        total = jax.lax.psum(part, over)
        self.unsummed[id(total)] = (total, part, over)
        return total


class JaxExperts:
    """Implement the operations of `JaxOps` for mixtures of experts."""

    layout: Layout | None
    devices: Any
    site: Any
    compute: Any
    rows: Rows | None
    _precision: Any
    weight: Callable[[Any], Any]
    _spec: Callable[..., Spec]

    def experts(self, body: Callable[..., Any], x_BSE: Any, experts_BSC: Any, weights_BSC: Any, *params: Any) -> Any:
        if self.rows is not None:
            raise UserError(
                "ops.experts", expected="a call outside of a body", got="a call in one", do="Call it alone."
            )
        body, params = factored(body, params)
        given = [self.weight(p) for p in params]
        check_experts(x_BSE, experts_BSC, weights_BSC, [tuple(p.shape) for p in given])
        x_BSE = x_BSE.astype(self.compute)
        if self.layout is None or self.devices is None or self.layout.mesh.devices == 1:
            run = functools.partial(_of_tokens, self._body(body, [((),) * (p.ndim - 1) for p in given]), (), False)
            return run(x_BSE, experts_BSC, weights_BSC, given)[0]
        return self._experts_on_mesh(body, x_BSE, experts_BSC, weights_BSC, params)

    def grouped_matmul(self, x_NE: Any, w_XEF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_matmul")
        check_grouped("ops.grouped_matmul", x_NE, w_XEF.shape)
        if isinstance(w_XEF, Factored):  # a factor contracts what the weight does: a part of the sum is one of both
            over, _ = rows.of(w_XEF.weight)
            return rows.completed(w_XEF.multiplied(lambda x, w: self._grouped(x, w, rows), x_NE), over)
        over, _ = rows.of(w_XEF)
        return rows.completed(self._grouped(x_NE, w_XEF, rows), over)

    def _grouped(self, x_NE: Any, w_XEF: Any, rows: Rows) -> Any:
        x, w = x_NE.astype(self.compute), w_XEF.astype(self.compute)
        shape = (*x.shape, w.shape[2], w.shape[0])
        case = Case(site=self.site, dtype=jnp.dtype(self.compute).name, shape=shape)
        kernel = choose_kernel.choose("grouped_matmul", case).kernel
        return kernel.load()(x, w, sizes_X=rows.sizes_X, precision=self._precision)

    def grouped_bias(self, x_NF: Any, p_XF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_bias")
        p_XF = not_adapted(p_XF)
        check_grouped("ops.grouped_bias", x_NF, p_XF.shape)
        each_NF = _of_expert(p_XF.astype(jnp.float32), rows.sizes_X, len(x_NF))
        total = (x_NF.astype(jnp.float32) + each_NF).astype(x_NF.dtype)
        if (known := rows.unsummed.get(id(x_NF))) is not None:
            _, part, over = known
            mine = jnp.where(jax.lax.axis_index(over) == 0, each_NF, 0)  # once, on the first of the devices
            rows.unsummed[id(total)] = (total, (part.astype(jnp.float32) + mine).astype(part.dtype), over)
        return total

    def _body(self, body: Callable[..., Any], splits: Sequence[Spec]) -> Callable[..., Any]:
        """Return the function of rows (N, E), sizes (X,) and params that runs a body: (result, axes over which it still
        has to be summed)."""

        def run(x_NE: Any, sizes_X: Any, params: Sequence[Any]) -> tuple[Any, tuple[str, ...]]:
            # Objects of their own, since one param may be given twice.
            params = [p + 0 if any(p is q for q in params[:i]) else p for i, p in enumerate(params)]
            rows = Rows(sizes_X, {id(p): split for p, split in zip(params, splits, strict=True)})
            inner: Any = dataclasses.replace(
                self,  # type: ignore[type-var]
                rows=rows,
                layout=None,
                devices=None,
                sample=None,
                auxes={},
                tallies={},
                across=None,
            )
            before = recorded(inner)
            found = check_body(body(inner, x_NE, *params), len(x_NE))
            check_quiet(inner, before, "ops.experts")
            _, part, over = rows.unsummed.get(id(found), (None, found, ()))
            return part, over

        return run

    def _experts_on_mesh(self, body: Any, x_BSE: Any, experts_BSC: Any, weights_BSC: Any, params: Sequence[Any]) -> Any:
        assert self.layout is not None
        mesh = self.layout.mesh
        held = [_held(self, p) for p in params]
        splits = [used[1:] for _, used, _ in held]
        exchange = held[0][1][0]
        if any(used[0] != exchange for _, used, _ in held):
            raise UserError(
                "ops.experts",
                expected="params that all have their experts over the same mesh axes",
                got=", ".join(str(used[0] or "no axis") for _, used, _ in held),
                do="Give every param the axis experts first.",
            )
        batch, seq, both = (self.layout.spec((axis,))[0] for axis in ("batch", "seq", "res_seq"))
        b, s = x_BSE.shape[:2]
        batch = () if b % mesh.over(batch) else batch
        # Tokens stay divided over tensor, as the residual stream is. If features are split over it, each of its devices
        # needs the tokens of all.
        seq = () if s % mesh.over(seq) else seq
        seq = both if both[: len(seq)] == seq and s % mesh.over(both) == 0 else seq
        over_features = {axis for split in splits for dim in split for axis in dim}
        spread = tuple(axis for axis in seq if axis in over_features)
        if spread and seq[-len(spread) :] != spread:
            seq, spread = tuple(axis for axis in seq if axis not in over_features), ()
        ragged = self.site.device in RAGGED
        run_body = self._body(body, splits)

        def run(x: Any, experts: Any, weights: Any, *stored: Any) -> Any:
            if spread:
                gather = functools.partial(jax.lax.all_gather, axis_name=spread, axis=1, tiled=True)
                x, experts, weights = gather(x), gather(experts), gather(weights)
            params = [_whole(p, gathers, self.compute) for p, (_, _, gathers) in zip(stored, held, strict=True)]
            out, over = _of_tokens(run_body, exchange, ragged, x, experts, weights, params)
            if over and over == spread:
                return jax.lax.psum_scatter(out, over, scatter_dimension=1, tiled=True)
            out = jax.lax.psum(out, over) if over else out
            if spread:
                size = out.shape[1] // mesh.over(spread)
                out = jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(spread) * size, size, axis=1)
            return out

        of_params = tuple(_partition(stored) for stored, _, _ in held)
        tokens = _partition((batch, seq, ()))
        mapped = jax.shard_map(
            run, mesh=self.devices, in_specs=(tokens, tokens, tokens, *of_params), out_specs=tokens, check_vma=False
        )
        # In float32, so that devices add the gradients of a parameter in float32.
        values = [_plain(p).astype(jnp.float32) for p in params]
        return mapped(x_BSE, experts_BSC, weights_BSC, *values)


RAGGED = ("tpu", "gpu", "cuda", "rocm")
"""The platforms for which XLA compiles `jax.lax.ragged_all_to_all`; elsewhere blocks of equal size are exchanged."""


def _plain(p: Any) -> Any:
    return p.get_value() if hasattr(p, "get_value") else p


def _held(ops: Any, p: Any) -> tuple[Spec, Spec, tuple[tuple[int, tuple[str, ...]], ...]]:
    """Return the specs of a param as stored and as used, and the (dimension, mesh axes) that are gathered between."""
    whole: Spec = ((),) * _plain(p).ndim
    is_param = hasattr(p, "get_metadata")
    used = (ops._spec(p, "compute") if is_param else ()) or whole
    stored = (ops._spec(p, "params") if is_param else ()) or whole
    if any(a[: len(b)] != b for a, b in zip(stored, used, strict=True)):
        stored = used
    gathers = tuple((d, a[len(b) :]) for d, (a, b) in enumerate(zip(stored, used, strict=True)) if a != b)
    return stored, used, gathers


def _partition(spec: Spec) -> PartitionSpec:
    return PartitionSpec(*(dim or None for dim in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(p: Any, gathers: tuple[tuple[int, tuple[str, ...]], ...], compute: Any) -> Any:
    """Gather a param over fsdp in the compute dtype. Its gradient is added in float32 and scattered."""
    p = p.astype(compute)
    for dim, axes in gathers:
        p = jax.lax.all_gather(p, axes, axis=dim, tiled=True)
    return p


def _whole_back(gathers: Any, compute: Any, _: None, g: Any) -> tuple[Any]:
    g = g.astype(jnp.float32)
    for dim, axes in gathers:
        g = jax.lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)
    return (g,)


_whole.defvjp(lambda p, gathers, compute: (_whole(p, gathers, compute), None), _whole_back)


def _of_tokens(
    run: Callable[..., Any], exchange: Exchange, ragged: bool, x: Any, experts: Any, weights: Any, params: Sequence[Any]
) -> tuple[Any, tuple[str, ...]]:
    """Return (B, S, F) for the tokens of this device, and the mesh axes over which it still has to be summed."""
    b, s, chosen = experts.shape
    flat_N = experts.reshape(-1)
    order_N, back_N = _order(flat_N)
    devices = jax.lax.axis_size(exchange) if exchange else 1
    sizes_X = _counts(flat_N, params[0].shape[0] * devices)
    rows_NE = _spread(x.reshape(b * s, -1), order_N, back_N)
    if exchange:
        found_NF, over = _on_their_devices(run, exchange, ragged, rows_NE, sizes_X, params)
    else:
        found_NF, over = run(rows_NE, sizes_X, params)
    each = _permuted(found_NF, back_N, order_N).reshape(b, s, chosen, -1)
    out = sum(each[:, :, c].astype(jnp.float32) * weights[:, :, c, None].astype(jnp.float32) for c in range(chosen))
    return out.astype(found_NF.dtype), over


def _on_their_devices(
    run: Callable[..., Any], exchange: Exchange, ragged: bool, rows_NE: Any, sizes_X: Any, params: Sequence[Any]
) -> tuple[Any, tuple[str, ...]]:
    """Exchange rows, run the body on the rows of this device's experts, and exchange the results."""
    devices, n = jax.lax.axis_size(exchange), len(rows_NE)
    mine_RY = sizes_X.reshape(devices, -1)
    theirs_RY = jax.lax.all_to_all(mine_RY, exchange, 0, 0, tiled=True)
    sends, gets = mine_RY.sum(1), theirs_RY.sum(1)
    got = _exchanged(rows_NE, sends, gets, devices * n, exchange, ragged)
    # Rows came device by device, sorted by expert on each; what is past their sum belongs to no expert.
    ends = jnp.cumsum(theirs_RY.reshape(-1))
    at = jnp.searchsorted(ends, jnp.arange(devices * n), side="right", method="sort")
    experts = theirs_RY.shape[1]
    order, back = _order(jnp.where(at < len(ends), at % experts, experts))
    found, over = run(_permuted(got, order, back), theirs_RY.sum(0), params)
    return _exchanged(_permuted(found, back, order), gets, sends, n, exchange, ragged), over


def _order(keys_N: Any) -> tuple[Any, Any]:
    """Return the stable order of keys, and its inverse."""
    order = jnp.argsort(keys_N, stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    return order, back


def _counts(experts_N: Any, n: int) -> Any:
    """Return (n,) int32: how often each expert occurs."""
    return jnp.zeros(n, jnp.int32).at[experts_N].add(1)


def _of_expert(p_XF: Any, sizes_X: Any, n: int) -> Any:
    """Return (N, F): of each row the param of its expert, 0 past the sum of the sizes. As a matmul, so that its
    gradient is one too, and not a sum of one row after another."""
    used = jnp.arange(n) < sizes_X.sum()
    return jax.lax.ragged_dot(
        used.astype(p_XF.dtype)[:, None], p_XF[:, None], sizes_X, precision=jax.lax.Precision.HIGHEST
    )


# ---- rows in another order; the gradient of a gather is a gather by the inverse


@jax.custom_vjp
def _permuted(x_NE: Any, order_N: Any, back_N: Any) -> Any:
    """Return x[order]."""
    return x_NE[order_N]


_permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


@jax.custom_vjp
def _spread(x_nE: Any, order_N: Any, back_N: Any) -> Any:
    """Return (N, E): the row of a token once for each of its experts, in `order`. The gradient of a token is the sum
    over its experts, in their order, in float32."""
    return x_nE[order_N // (len(order_N) // len(x_nE))] if len(x_nE) else jnp.zeros_like(x_nE)


def _spread_back(saved: Any, g: Any) -> Any:
    back, tokens = saved
    each = g[back].reshape(tokens.shape[0], -1, g.shape[1])
    total = sum(each[:, c].astype(jnp.float32) for c in range(each.shape[1]))
    return jnp.asarray(total).astype(g.dtype), None, None


_spread.defvjp(lambda x, order, back: (_spread(x, order, back), (back, jnp.zeros((len(x), 0)))), _spread_back)


# ---- the exchange


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchanged(x_NE: Any, sends_R: Any, gets_R: Any, n: int, exchange: Exchange, ragged: bool) -> Any:
    """Send the first sends[0] rows to device 0 of the exchange, the next sends[1] to device 1, and so on. Return
    (n, E): the gets[0] rows from device 0, the gets[1] from device 1, and so on, then zeros."""
    swap = _ragged if ragged else _padded
    return swap(x_NE, sends_R, gets_R, n, exchange)


_exchanged.defvjp(
    lambda x, sends, gets, n, exchange, ragged: (
        _exchanged(x, sends, gets, n, exchange, ragged),
        (sends, gets, jnp.zeros((len(x), 0))),
    ),
    lambda n, exchange, ragged, saved, g: (
        _exchanged(g, saved[1], saved[0], saved[2].shape[0], exchange, ragged),
        None,
        None,
    ),
)


def _starts(sizes_R: Any) -> Any:
    return jnp.cumsum(sizes_R) - sizes_R


def _ragged(x_NE: Any, sends_R: Any, gets_R: Any, n: int, exchange: Exchange) -> Any:
    all_RR = jax.lax.all_gather(sends_R, exchange)  # [from, to]
    before = (jnp.arange(len(sends_R)) < jax.lax.axis_index(exchange))[:, None]
    there_R = jnp.where(before, all_RR, 0).sum(0)  # where my rows begin at each receiver
    out = jnp.zeros((n, x_NE.shape[1]), x_NE.dtype)
    return jax.lax.ragged_all_to_all(x_NE, out, _starts(sends_R), sends_R, there_R, gets_R, axis_name=exchange)


def _padded(x_NE: Any, sends_R: Any, gets_R: Any, n: int, exchange: Exchange) -> Any:
    """Exchange blocks of equal size, which have room for all rows that a device can have for another."""
    size = min(len(x_NE), n)
    at = jnp.arange(size)
    take = _starts(sends_R)[:, None] + at
    blocks = jnp.where((at < sends_R[:, None])[..., None], x_NE[jnp.minimum(take, len(x_NE) - 1)], 0)
    got = jax.lax.all_to_all(blocks, exchange, 0, 0, tiled=True)
    place = jnp.arange(n)
    source = jnp.searchsorted(jnp.cumsum(gets_R), place, side="right", method="sort")
    there = source < len(gets_R)
    source = jnp.minimum(source, len(gets_R) - 1)
    index = jnp.minimum(place - _starts(gets_R)[source], size - 1)
    return jnp.where(there[:, None], got[source, index], 0)
