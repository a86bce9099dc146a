"""Write the decoder of `recipes/models/decoder.py` and its training step as one does in plain JAX.

The choices: a pytree of stacked parameters and lax.scan over the layers; two-dimensional weights;
jax.nn.dot_product_attention; rotations from tables made once; optax's integer cross-entropy on all logits; optax.chain
of clip_by_global_norm and adamw with decay on matrices alone; one jit, its parameters and optimizer state donated.

B batch, S seq, E embed, H heads, K kv_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.shapes import ADAMW, CLIP_NORM, Shape
from portatrain.backends.jax.flags import compiler_options

Step = Callable[[], float]


def rms_norm(x: Any, scale: Any, eps: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale


def rotate(x_BSHD: Any, cos: Any, sin: Any) -> Any:
    x1, x2 = jnp.split(x_BSHD, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def tables(s: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin, (S, 1, D/2)."""
    frequencies = np.float32(s.rope_theta ** (-np.arange(0, s.head_dim, 2) / s.head_dim))
    angles = np.arange(s.seq, dtype=np.float32)[:, None, None] * frequencies
    return np.cos(angles), np.sin(angles)


def loss_of(
    shape: Shape, params: Mapping[str, Any], batch: Mapping[str, Any], rows: Callable[[Any], Any] = lambda x: x
) -> Any:
    """Return the mean loss. `rows` constrains an activation to be sharded over its rows."""
    cos, sin = tables(shape)
    mask = None
    if shape.packed:
        cos, sin = (jnp.asarray(t)[batch["positions"]] for t in (cos, sin))
        segment_ids = batch["segment_ids"]
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

    def block(x_BSE: Any, p: Mapping[str, Any]) -> Any:
        b, s, _ = x_BSE.shape
        x_BSE = rows(x_BSE)
        y = rms_norm(x_BSE, p["attn_norm"], shape.norm_eps)
        q = rotate((y @ p["wq"]).reshape(b, s, shape.heads, shape.head_dim), cos, sin)
        k = rotate((y @ p["wk"]).reshape(b, s, shape.kv_heads, shape.head_dim), cos, sin)
        v = (y @ p["wv"]).reshape(b, s, shape.kv_heads, shape.head_dim)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
        x_BSE = rows(x_BSE + out.reshape(b, s, -1) @ p["wo"])
        y = rms_norm(x_BSE, p["mlp_norm"], shape.norm_eps)
        return x_BSE + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    x_BSE = rows(params["embed"][batch["tokens"]])
    x_BSE, _ = jax.lax.scan(block, x_BSE, params["blocks"])
    logits = rms_norm(x_BSE, params["final_norm"], shape.norm_eps) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def load(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return portatrain's parameters, with (N, E, H, D) as (N, E, H*D) and (N, H, D, E) as (N, H*D, E)."""
    block = {"attn_norm": params["blocks/attn_norm/scale"], "mlp_norm": params["blocks/mlp_norm/scale"]}
    for name in ("wq", "wk", "wv"):
        block[name] = params[f"blocks/attn/{name}"].reshape(*params[f"blocks/attn/{name}"].shape[:2], -1)
    wo = params["blocks/attn/wo"]
    block["wo"] = wo.reshape(wo.shape[0], -1, wo.shape[-1])
    block |= {name: params[f"blocks/mlp/{name}"] for name in ("gate", "up", "down")}
    given = {"embed": params["embed/table"], "final_norm": params["final_norm/scale"], "blocks": block}
    return jax.tree.map(lambda a: jnp.array(a, copy=True), given)


def step_of(shape: Shape, rows: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Any]:
    """Return (optimizer, step): step(params, opt, batch) -> (params, opt, loss, gradient norm)."""

    def decays(params: Any) -> Any:
        norms = ("attn_norm", "mlp_norm", "final_norm")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in norms, params)

    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(ADAMW.lr, b1=ADAMW.b1, b2=ADAMW.b2, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay, mask=decays),
    )

    def step(params: Any, opt: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: loss_of(shape, p, batch, rows))(params)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss, optax.tree.norm(grads)

    return optimizer, step


def make_step(shape: Shape, *, defaults: bool) -> tuple[Any, Any]:
    """Return (optimizer, compiled step).

    The matmul is the one that ours selects (portatrain/backends/jax/flags.py), so that the two compute with the same
    kernels; with `defaults` it is XLA's own choice, which is less exact.
    """
    optimizer, step = step_of(shape)
    options = {} if defaults else compiler_options(jax.devices()[0].platform)
    return optimizer, jax.jit(step, donate_argnums=(0, 1), compiler_options=options)


def hand_written(
    shape: Shape, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], *, defaults: bool = False
) -> Step:
    optimizer, step = make_step(shape, defaults=defaults)
    held = load(params)
    state = [held, optimizer.init(held)]
    given = {k: v for k, v in batch.items() if k != "sample"}

    def run() -> float:
        state[0], state[1], loss, _ = step(*state, given)
        jax.block_until_ready(state)
        return float(loss)

    return run


def hand_sharded(
    shape: Shape, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], *, devices: int
) -> Step:
    """Shard every matrix and table over its embed axis and the batch over its rows, norms whole; one jit, donated."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    optimizer, step = step_of(shape, lambda x: jax.lax.with_sharding_constraint(x, rows))

    def placed(path: Any, leaf: Any) -> Any:
        last = {"wo": 2, "down": 2, "embed": 1}  # (N, inputs, E), (V, E)
        spec = [None] * leaf.ndim
        name = path[-1].key
        if leaf.ndim > 1 and "norm" not in name:
            spec[last.get(name, leaf.ndim - 2)] = "fsdp"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    held = jax.tree_util.tree_map_with_path(placed, load(params))
    state = [held, jax.jit(optimizer.init)(held)]
    shardings = jax.tree.map(lambda p: p.sharding, held)
    of_opt = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        state[1],
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    state[1] = jax.device_put(state[1], of_opt)
    given = {k: jax.device_put(v, rows) for k, v in batch.items() if k != "sample"}
    whole = NamedSharding(mesh, PartitionSpec())
    run_step = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(shardings, of_opt, whole, whole),
        compiler_options=compiler_options(jax.devices()[0].platform),
    )

    def run() -> float:
        state[0], state[1], loss, _ = run_step(*state, given)
        jax.block_until_ready(state)
        return float(loss)

    return run


def hand_written_hlo(
    shape: Shape, params: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], *, defaults: bool = False
) -> str:
    """Return the optimised program."""
    optimizer, step = make_step(shape, defaults=defaults)
    held = load(params)
    given = {k: v for k, v in batch.items() if k != "sample"}
    return step.lower(held, optimizer.init(held), given).compile().as_text()
