"""`Ops` in JAX. Arrays are global: under jit a sharding is a constraint, never a change of shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from portatrain.backends import choose_kernel
from portatrain.backends.jax import fp8
from portatrain.backends.jax.across_samples import AcrossSamples
from portatrain.backends.jax.attention import SITE
from portatrain.backends.jax.cpu_products import may_merge, product_of
from portatrain.backends.jax.experts import JaxExperts, Rows
from portatrain.backends.jax.losses import cross_entropy
from portatrain.backends.jax.low_precision import contraction, low_rows, transposable
from portatrain.backends.jax.measured import Measured
from portatrain.backends.jax.ops_arrays import JaxArrays
from portatrain.backends.jax.sharding_constraints import OnMesh, gathered, partition_spec, plain
from portatrain.backends.kernels import Case, Site
from portatrain.backends.token_ids import TokenIds
from portatrain.model import dropout_hash
from portatrain.model.across_samples import Across
from portatrain.model.fp8 import Form
from portatrain.model.layout import Layout
from portatrain.model.lora import adapts, not_adapted
from portatrain.model.ops import Aux, Loss, check_aux, check_layer, check_samples
from portatrain.model.ops_results import OF_LAYERS
from portatrain.model.remat import POLICIES, Policy, check_used
from portatrain.model.rope import Scaling, rotary
from portatrain.model.scaled import looks_up, scores

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int32": jnp.int32, "bool": jnp.bool_}


def saveable(policy: Policy) -> Any:
    """Return the `jax.checkpoint` policy that keeps the values that `policy` names."""
    known = jax.checkpoint_policies
    if policy.dots:
        return known.dots_with_no_batch_dims_saveable
    if policy.offload:
        return known.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=sorted(policy.names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return known.save_only_these_names(*sorted(policy.names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed_in_two_steps(p: Any, lead: tuple[int, ...]) -> Any:
    """Broadcast `p` to (*lead, *p.shape), where lead is (B, 1, ...). Its gradient is summed within samples first, then
    over samples.

    XLA on a CPU adds all rows of a column one after another: the gradient of a bias over 1024 rows is off by 2e-6 of
    its scale. Without a barrier XLA would merge the two sums into one.
    """
    return jnp.broadcast_to(p, (*lead, *p.shape))


summed_in_two_steps.defvjp(
    lambda p, lead: (jnp.broadcast_to(p, (*lead, *p.shape)), None),
    lambda lead, _, g: (jnp.sum(jax.lax.optimization_barrier(g), axis=tuple(range(len(lead)))),),
)


@dataclasses.dataclass
class JaxOps(Measured, OnMesh, AcrossSamples, JaxArrays, JaxExperts):
    """See `model.ops.Ops`. Every trace makes a new instance; `auxes` and `tallies` collect the values that it
    records."""

    step: Any
    seed_2: Any
    sample: Any
    layer: Any
    training: bool
    compute: Any = jnp.float32
    remat: Policy = POLICIES["none"]
    layout: Layout | None = None
    devices: jax.sharding.Mesh | None = None
    site: Site = SITE
    auxes: dict[str, Aux] = dataclasses.field(default_factory=dict)
    tallies: dict[str, Any] = dataclasses.field(default_factory=dict)
    named: set[str] = dataclasses.field(default_factory=set)
    given: Any = None
    """The arrays of the batch, for `ids`."""
    ids: TokenIds | None = None
    across: Across | None = dataclasses.field(default_factory=Across)
    rows: Rows | None = None
    """In the body of `experts`."""
    measured: bool = False
    """True if the step records activations (`model/measured.py`)."""
    path: str = ""
    hushed: bool = False

    @property
    def _precision(self) -> Any:
        # An accelerator would otherwise round float32 operands to bfloat16 or TF32.
        return jax.lax.Precision.HIGHEST if self.compute == jnp.float32 else None

    # ---- parameters and contractions

    def weight(self, p: Any) -> Any:
        p = not_adapted(p)
        value = plain(p)
        if not isinstance(p, nnx.Param):
            return value
        value, (used, stored) = value.astype(self.compute), self._gathering(p)
        return value if used is None else gathered(value, used, stored)

    @adapts
    def einsum(self, spec: str, *operands: Any, dtype: str | None = None) -> Any:
        letters, _, out = spec.replace(" ", "").partition("->")
        terms = letters.split(",")
        split = self._split(terms, operands)
        if dtype == "exact":
            return self._exact(spec, operands, split, terms, out)
        if dtype is None and self._is_low(operands[-1]) and transposable(spec):
            x, w = (plain(value) for value in operands)
            x = self._along(x, terms[0], split)
            product = contraction(spec, self.compute, w.dtype, self._gathering(operands[-1]), x, w)
            return self._along(product, out, split)
        arrays = [self.weight(x) if isinstance(x, nnx.Param) else plain(x) for x in operands]
        arrays = [self._along(x.astype(self.compute), its, split) for x, its in zip(arrays, terms, strict=True)]
        contract: Any = self._product(spec, operands) or functools.partial(jnp.einsum, spec)
        product = contract(
            *arrays, precision=self._precision, preferred_element_type=DTYPES[dtype] if dtype else self.compute
        )
        return self._along(product, out, split)

    def _exact(self, spec: str, operands: Sequence[Any], split: Any, terms: Sequence[str], out: str) -> Any:
        arrays = [self.weight(x).astype(jnp.float32) for x in operands]
        arrays = [self._along(x, its, split) for x, its in zip(arrays, terms, strict=True)]
        product = jnp.einsum(spec, *arrays, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return self._along(product, out, split)

    def einsum_fp8(self, form: Form, x: Any, w: Any) -> Any:
        """Return the product of precision fp8 (`model/fp8.py`) of an activation and a parameter."""
        split = self._split((form.x, form.w), (x, w))
        x = self._along(plain(x), form.x, split)
        case = Case(
            site=self.site,
            dtype=jnp.dtype(self.compute).name,
            shape=form.sizes(x.shape, plain(w).shape),
            traits=frozenset({f"{form.scaling}-scales"}),
        )
        how = (choose_kernel.choose("fp8_matmul", case).kernel, self.site.formats)
        product = fp8.contraction(form, self.compute, plain(w).dtype, self._gathering(w), how, x, plain(w))
        return self._along(product, form.out, split)

    def _product(self, spec: str, operands: Sequence[Any]) -> Any:
        """Return the product of matrices that an einsum is on a CPU; None: leave it to XLA."""
        return product_of(spec) if self._merges and isinstance(operands[-1], nnx.Param) else None

    @property
    def _merges(self) -> bool:
        return self.site.device == "cpu" and may_merge(self.layout)

    def _note(self, table_VE: Any, ids: Any) -> None:
        shape = getattr(plain(table_VE), "shape", None)  # None: with LoRA factors, which the operation refuses
        if self.ids is not None and shape:
            self.ids.note(self.given, ids, shape[0])

    @looks_up
    def embed(self, table_VE: Any, ids: Any) -> Any:
        # The table keeps its stored sharding on the mesh, because the rows that were looked up are smaller.
        self._note(table_VE, ids)
        table, find = plain(table_VE), self._finder(table_VE, ids)
        if self._is_low(table_VE):
            return low_rows(self.compute, table.dtype, table.shape, find, table, ids)
        return find(table.astype(self.compute), ids)

    def _is_low(self, p: Any) -> bool:
        """Return whether `p` is a parameter that is used in less than float32."""
        return isinstance(p, nnx.Param) and self.compute != jnp.float32

    def bias(self, x: Any, p: Any) -> Any:
        return (x.astype(jnp.float32) + self._features(p, x)).astype(x.dtype)

    # ---- normalisation, position, attention

    def rms_norm(self, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        return (y if scale is None else y * self._features(scale, y)).astype(x.dtype)

    def layer_norm(self, x: Any, scale: Any = None, bias: Any = None, *, eps: float = 1e-6) -> Any:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
        if scale is not None:
            y = y * self._features(scale, y)
        if bias is not None:
            y = y + self._features(bias, y)
        return y.astype(x.dtype)

    def _features(self, p: Any, like: Any) -> Any:
        """Return a parameter in float32, in a shape that broadcasts over `like`, (B, ..., *p.shape)."""
        p = self.weight(p).astype(jnp.float32)
        between = like.ndim - p.ndim - 1
        if self.site.device != "cpu" or between < 1:
            return p
        return summed_in_two_steps(p, (like.shape[0], *(1,) * between))

    def rope_table(
        self, positions: Any, head_dim: int, *, theta: float = 10000.0, scaling: Scaling | None = None
    ) -> tuple[Any, Any]:
        frequencies, factor = rotary(head_dim, theta, scaling, positions.shape[-1])
        angles = positions.astype(jnp.float32)[..., None] * np.array(frequencies, np.float32)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return (cos, sin) if factor == 1 else (factor * cos, factor * sin)

    def rope(self, x_BSHD: Any, table: tuple[Any, Any]) -> Any:
        cos, sin = (t[..., None, :] for t in table)  # (S, 1, D/2) or (B, S, 1, D/2): broadcast over heads
        x1, x2 = jnp.split(x_BSHD.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BSHD.dtype)

    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        if (sinks := options.get("sinks")) is not None:
            options["sinks"] = self.weight(sinks)
        self.logits(q_BSHD, k_BTKD, options)
        name = "attention"
        self.named.add(name)
        kept = name if self.remat.by_name else None
        return self._attended(q_BSHD, k_BTKD, v_BTKD, precision=self._precision, name=kept, **options)

    # ---- elementwise and shape

    def dropout(self, x: Any, rate: float, *, site: int) -> Any:
        if not self.training or rate == 0:
            return x
        keys_B = dropout_hash.sample_keys(self.seed_2, self.step, site, self.layer, self.sample)
        offsets = jax.lax.iota(jnp.int32, int(np.prod(x.shape[1:], dtype=np.int64)))
        bits = dropout_hash.random_bits(keys_B[:, None], offsets[None, :]).reshape(x.shape)
        return jnp.where(bits >= dropout_hash.threshold(rate), x * (1 / (1 - rate)), 0).astype(x.dtype)

    def silu(self, x: Any) -> Any:
        self.units(x)
        return jax.nn.silu(x)

    def gelu(self, x: Any, *, approximate: bool = False) -> Any:
        self.units(x)
        return jax.nn.gelu(x, approximate=approximate)

    def relu(self, x: Any) -> Any:
        self.units(x)
        return jnp.where(x <= 0, 0, x)  # where jnp.maximum has derivative 1/2 at 0

    def sigmoid(self, x: Any) -> Any:
        return jax.nn.sigmoid(x)

    def tanh(self, x: Any) -> Any:
        return jnp.tanh(x)

    def exp(self, x: Any) -> Any:
        return jnp.exp(x)

    def log(self, x: Any) -> Any:
        return jnp.log(x)

    def softmax(self, x: Any, *, axis: int = -1) -> Any:
        return jax.nn.softmax(x.astype(jnp.float32), axis=axis).astype(x.dtype)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return jnp.where(condition, x, y)

    def concat(self, xs: Sequence[Any], *, axis: int) -> Any:
        return jnp.concatenate(list(xs), axis=axis)

    def cast(self, x: Any, dtype: str) -> Any:
        return plain(x).astype(self.compute if dtype == "compute" else DTYPES[dtype])

    def arange(self, n: int) -> Any:
        return jnp.arange(n, dtype=jnp.int32)

    def one_hot(self, ids: Any, n: int) -> Any:
        return jax.nn.one_hot(ids, n, dtype=jnp.float32)

    def top_k(self, x: Any, k: int) -> tuple[Any, Any]:
        # jax.lax.top_k would take -0 for less than 0. The derivative of the sum is 1, as before.
        return jax.lax.top_k(x + jax.lax.stop_gradient(jnp.where(x == 0, -x, 0)), k)

    def write(self, cache_BT: Any, value: Any, at: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(cache_BT, value.astype(cache_BT.dtype), at, axis=1)

    def sum(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
        dims = tuple(i for i, a in enumerate(axes) if a in over)
        return jnp.sum(x, axis=dims, dtype=jnp.float32)

    def mean(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
        count = np.prod([n for n, a in zip(x.shape, axes, strict=True) if a in over], dtype=np.float64)
        return self.sum(x, axes, over=over) / np.float32(count)

    def stop_gradient(self, x: Any) -> Any:
        return jax.lax.stop_gradient(plain(x))

    # ---- losses

    @scores
    def cross_entropy(
        self,
        x: Any,
        table_VE: Any,
        targets: Any,
        *,
        mask: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        self._note(table_VE, targets)
        total, loss_B, weight_B = cross_entropy(
            x,
            self.weight(table_VE),
            targets,
            mask,
            z_loss=z_loss,
            softcap=softcap,
            precision=self._precision,
            cut=self._cut(table_VE),
            merge=self._merges,
        )
        return Loss(total, weight_B, loss_B)

    def loss(self, loss_B: Any, weight_B: Any) -> Loss:
        check_samples(loss_B, weight_B)
        loss_B = loss_B.astype(jnp.float32)
        return Loss(jnp.sum(loss_B), weight_B.astype(jnp.float32), jax.lax.stop_gradient(loss_B))

    # ---- structure

    def shard(self, x: Any, *axes: str | None) -> Any:
        if self.layout is None or self.devices is None:
            return x
        spec = self.layout.spec(axes, what=f"ops.shard of shape {x.shape}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.devices, partition_spec(spec)))

    def stack(self, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        graph, stacked = nnx.split(stack.block)
        recorded: dict[str, Aux] = {}  # what is static of the auxes: known once the body has been traced
        named: set[str] = set()

        def body(carry: Any, xs: Any) -> Any:
            mine, index, extra = xs
            layer = self.layer * stack.n + index
            inner = dataclasses.replace(self, layer=layer, auxes={}, tallies={}, named=named, across=None)
            args = shared if per_layer is None else (*shared, extra)
            block = nnx.merge(graph, mine)
            carry, out = check_layer(block, block(inner, carry, *args))
            recorded.update(inner.auxes)
            return carry, (out, {k: a.value_B for k, a in inner.auxes.items()}, inner.tallies)

        if not self.remat.keeps_all and self.training:
            body = jax.checkpoint(body, prevent_cse=False, policy=saveable(self.remat))
        xs = (stacked, jnp.arange(stack.n, dtype=jnp.int32), per_layer)
        carry, (outs, auxes, tallies) = jax.lax.scan(body, carry, xs)
        if self.training:
            check_used(self.remat, named)
        self.named |= named
        for key, values_NB in auxes.items():
            one = recorded[key]
            value_B = _of_layers(values_NB, one.reduce)
            self._record(key, dataclasses.replace(one, value_B=value_B, count=one.count * stack.n))
        for key, value in tallies.items():
            self.tallies[key] = self.tallies[key] + value if key in self.tallies else value
        return carry, outs

    def name(self, x: Any, name: str) -> Any:
        self.named.add(name)
        return checkpoint_name(x, name) if self.remat.by_name else x

    def aux(self, name: str, value_B: Any, *, reduce: str = "mean", loss: float = 0.0) -> None:
        check_aux(name, value_B, reduce, loss)
        if reduce == "layers":
            if not self.training:
                return
            value_B = jax.lax.stop_gradient(value_B)[:, None]
        self._record(name, Aux(value_B.astype(jnp.float32), 1, reduce, loss))

    def _record(self, name: str, aux: Aux) -> None:
        held = self.auxes.get(name)
        self.auxes[name] = aux if held is None else held.join(name, aux, jnp.maximum, jnp.concatenate)

    def tally(self, module: Any, **values: Any) -> None:
        if not self.training:
            return
        for key, value in values.items():
            full = f"{module.path}/{key}" if module.path else key
            value = jax.lax.stop_gradient(value).astype(plain(getattr(module, key)).dtype)
            self.tallies[full] = self.tallies[full] + value if full in self.tallies else value


def _of_layers(values_NB: Any, reduce: str) -> Any:
    """Combine what each of N layers of a Stack recorded: (B,), or (B, N * calls, ...) if it keeps them apart."""
    if reduce in OF_LAYERS:
        values_BN = jnp.moveaxis(values_NB, 0, 1)
        return values_BN.reshape(values_BN.shape[0], -1, *values_BN.shape[3:])
    return jnp.max(values_NB, axis=0) if reduce == "max" else jnp.sum(values_NB, axis=0)
