"""`ReferenceOps`: the operations of `portatrain.model.ops.Ops` in NumPy float64; `Ops` documents them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from portatrain.backends.reference import fp8
from portatrain.backends.reference.experts import ReferenceExperts
from portatrain.backends.reference.ops_arrays import ReferenceArrays
from portatrain.backends.reference.trees import tree_map
from portatrain.errors import UserError, choice
from portatrain.model import dropout_hash
from portatrain.model.across_samples import Across, check_arrays, grouped, outside_stacks, results
from portatrain.model.attention_rules import slopes_of
from portatrain.model.bind import bind, source_of
from portatrain.model.fp8 import Form
from portatrain.model.lora import adapts, not_adapted
from portatrain.model.module import Module, Param, Stack, State
from portatrain.model.ops import Aux, Loss, check_aux, check_layer, check_samples
from portatrain.model.rope import Scaling, rotary
from portatrain.model.scaled import looks_up, scores

Array = np.ndarray


class ReferenceOps(ReferenceArrays, ReferenceExperts):
    """The oracle. All floating arrays are float64: 'float32', 'bfloat16' and 'compute' mean float64.

    Args:
        seed, step: those of the run, for dropout.
        sample: (B,) integers, the sample numbers, for dropout.
        training: True to apply dropout and record tallies.
        values: id of a Param or State -> its logical array; only needed to run a model.

    Attributes:
        auxes: name -> the value that `aux` recorded.
        tallies: id of a State -> {index in the Stacks: the sum that `tally` recorded}.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        step: int = 1,
        sample: Array | None = None,
        training: bool = False,
        values: Mapping[int, Array] | None = None,
    ) -> None:
        self.training = training
        self.step = np.asarray(step, np.int32)
        self.layer = np.asarray(0, np.int32)
        self.sample = np.array([dropout_hash.words(int(n)) for n in sample] if sample is not None else [], np.int32)
        self._seed_2 = np.array(dropout_hash.words(seed), np.int32)
        self._values = values or {}
        self._index: tuple[int, ...] = ()
        self.auxes: dict[str, Aux] = {}
        self.tallies: dict[int, dict[tuple[int, ...], Array]] = {}

    # ---- parameters and contractions

    def weight(self, p: Array) -> Array:
        return not_adapted(p)

    @adapts
    def einsum(self, spec: str, *operands: Array, dtype: str | None = None) -> Array:
        return np.einsum(spec, *operands)

    def einsum_fp8(self, form: Form, x: Array, w: Array) -> Array:
        """Return the product of precision fp8 (`model/fp8.py`) of an activation and a parameter."""
        return fp8.product(form, x, w)

    @looks_up
    def embed(self, table_VE: Array, ids: Array) -> Array:
        if ids.size and not (ids.min() >= 0 and ids.max() < len(table_VE)):
            raise UserError(
                "ops.embed",
                expected=f"ids from 0 to {len(table_VE) - 1}, the rows of the table",
                got=f"some from {ids.min()} to {ids.max()}",
                do="Enlarge the table, or correct the ids.",
            )
        return table_VE[ids]

    def bias(self, x: Array, p: Array) -> Array:
        return x + p

    # ---- normalisation, position, attention

    def rms_norm(self, x: Array, scale: Array | None = None, *, eps: float = 1e-6) -> Array:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        return y if scale is None else y * scale

    def layer_norm(
        self, x: Array, scale: Array | None = None, bias: Array | None = None, *, eps: float = 1e-6
    ) -> Array:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        y = y if scale is None else y * scale
        return y if bias is None else y + bias

    def rope_table(
        self, positions: Array, head_dim: int, *, theta: float = 10000.0, scaling: Scaling | None = None
    ) -> tuple[Array, Array]:
        frequencies, factor = rotary(head_dim, theta, scaling, positions.shape[-1])
        angles = positions[..., None].astype(np.float32) * np.array(frequencies, np.float32)
        angles = angles.astype(np.float64)
        return factor * np.cos(angles), factor * np.sin(angles)

    def rope(self, x_BSHD: Array, table: tuple[Array, Array]) -> Array:
        cos, sin = (t[..., None, :] for t in table)
        x1, x2 = np.split(x_BSHD, 2, axis=-1)
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)

    def attention(
        self,
        q_BSHD: Array,
        k_BTKD: Array,
        v_BTKD: Array,
        *,
        causal: bool = True,
        window: int | None = None,
        segment_ids: Array | tuple[Array, Array] | None = None,
        positions: tuple[Array, Array] | None = None,
        prefix: Array | None = None,
        alibi: bool | Sequence[float] = False,
        softcap: float | None = None,
        sinks: Array | None = None,
        scale: float | None = None,
    ) -> Array:
        S, H, D = q_BSHD.shape[1:]
        T, K = k_BTKD.shape[1:3]
        q_pos, k_pos = positions if positions is not None else (np.arange(S), np.arange(T))
        behind = q_pos[..., :, None] - k_pos[..., None, :]  # (S, T) or (B, S, T)
        visible = behind >= 0 if causal else np.ones_like(behind, bool)
        if window is not None:
            visible = visible & (np.abs(behind) < window)
        if prefix is not None:
            visible = visible | (prefix != 0)[:, None, :]
        if segment_ids is not None:
            q_seg, k_seg = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
            visible = visible & (q_seg[:, :, None] == k_seg[:, None, :])
        out = np.zeros((*q_BSHD.shape[:3], v_BTKD.shape[3]))
        slopes = slopes_of(alibi, H)
        for h in range(H):
            k_BTD, v_BTD = k_BTKD[:, :, h // (H // K)], v_BTKD[:, :, h // (H // K)]
            scores_BST = (D**-0.5 if scale is None else scale) * (q_BSHD[:, :, h] @ k_BTD.swapaxes(1, 2))
            if softcap is not None:
                scores_BST = softcap * np.tanh(scores_BST / softcap)
            if slopes is not None:
                scores_BST = scores_BST - slopes[h] * np.abs(behind)
            scores_BST = np.where(visible, scores_BST, -np.inf)
            sink = -np.inf if sinks is None else sinks[h]
            top = scores_BST.max(-1, keepdims=True, initial=sink)
            top = np.where(np.isfinite(top), top, 0.0)
            weights_BST = np.exp(scores_BST - top)
            total = weights_BST.sum(-1, keepdims=True) + np.exp(sink - top)
            out[:, :, h] = (weights_BST / np.where(total == 0, 1.0, total)) @ v_BTD
        return out

    # ---- elementwise and shape

    def dropout(self, x: Array, rate: float, *, site: int) -> Array:
        if not self.training or rate == 0:
            return x
        with np.errstate(over="ignore"):
            keys_B = dropout_hash.sample_keys(self._seed_2, self.step, site, self.layer, self.sample)
            offsets = np.arange(math.prod(x.shape[1:]), dtype=np.int32)
            bits = dropout_hash.random_bits(keys_B[:, None], offsets[None, :]).reshape(x.shape)
        return np.where(bits < dropout_hash.threshold(rate), 0.0, x / (1 - rate))

    def silu(self, x: Array) -> Array:
        return x * self.sigmoid(x)

    def gelu(self, x: Array, *, approximate: bool = False) -> Array:
        if approximate:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * np.vectorize(math.erfc, otypes=[float])(-x / math.sqrt(2))

    def relu(self, x: Array) -> Array:
        return np.maximum(x, 0)

    def sigmoid(self, x: Array) -> Array:
        return np.exp(-np.logaddexp(0, -x))

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def softmax(self, x: Array, *, axis: int = -1) -> Array:
        e = np.exp(x - x.max(axis, keepdims=True, initial=-np.inf))
        return e / e.sum(axis, keepdims=True)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    def concat(self, xs: Sequence[Array], *, axis: int) -> Array:
        return np.concatenate(xs, axis)

    def cast(self, x: Array, dtype: str) -> Array:
        dtypes = {"float32": float, "bfloat16": float, "compute": float, "int32": np.int32, "bool": bool}
        if dtype not in dtypes:
            raise choice("ops.cast", dtype, dtypes)
        return x.astype(dtypes[dtype])

    def arange(self, n: int) -> Array:
        return np.arange(n, dtype=np.int32)

    def one_hot(self, ids: Array, n: int) -> Array:
        return (ids[..., None] == np.arange(n)).astype(float)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        indices = np.lexsort((-x, ~np.isnan(x)), axis=-1)[..., :k]  # NaN counts as the largest
        return np.take_along_axis(x, indices, -1), indices.astype(np.int32)

    def write(self, cache_BT: Array, value: Array, at: Array) -> Array:
        written = cache_BT.copy()
        written[:, int(at) : int(at) + value.shape[1]] = value
        return written

    def sum(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        return x.sum(_dims("ops.sum", x, axes, over))

    def mean(self, x: Array, axes: Sequence[str | None], *, over: Sequence[str]) -> Array:
        return x.mean(_dims("ops.mean", x, axes, over))

    def stop_gradient(self, x: Array) -> Array:
        return x

    # ---- losses

    @scores
    def cross_entropy(
        self,
        x: Array,
        table_VE: Array,
        targets: Array,
        *,
        mask: Array | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        logits = x @ table_VE.T
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        top = logits.max(-1)
        log_z = top + np.log(np.exp(logits - top[..., None]).sum(-1))
        each = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0] + z_loss * log_z**2
        weight = np.ones(targets.shape) if mask is None else mask
        rest = tuple(range(1, targets.ndim))
        return self.loss((each * weight).sum(rest), weight.sum(rest))

    def loss(self, loss_B: Array, weight_B: Array) -> Loss:
        check_samples(loss_B, weight_B)
        return Loss(loss_B.sum(), weight_B, loss_B)

    def across_samples(self, fn: Callable[..., Any], *xs: Array, group: int | None = None) -> Loss:
        outside_stacks(Across() if self._index == () else None)
        loss_B, weight_B, metrics = self._compared(fn, xs, group)
        for name, value_B in metrics.items():
            self.aux(name, value_B)
        return self.loss(loss_B, weight_B)

    def _compared(
        self, fn: Callable[..., Any], xs: tuple[Array, ...], group: int | None
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Return (losses, weights, metrics), each (B,)."""
        rows = check_arrays(xs, group)
        shape = grouped(rows, group)
        there_B = self.sample[:, 1] >= 0 if len(self.sample) == rows else np.ones(rows, bool)
        loss, weight, metrics = results(fn(*(x.reshape(*shape, *x.shape[1:]) for x in (*xs, there_B))), shape)
        return loss.reshape(-1), weight.reshape(-1), {name: value.reshape(-1) for name, value in metrics.items()}

    # ---- structure

    def shard(self, x: Array, *axes: str | None) -> Array:
        _check_axes("ops.shard", x, axes)
        return x

    def stack(self, stack: Stack, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        outer_layer, outer_index, outs = self.layer, self._index, []
        for i in range(stack.n):
            self.layer = np.asarray(int(outer_layer) * stack.n + i, np.int32)
            self._index = (*outer_index, i)
            mine = () if per_layer is None else (tree_map(_slice(i), per_layer),)
            carry, out = self._layer(stack.block, carry, *shared, *mine)
            outs.append(out)
        self.layer, self._index = outer_layer, outer_index
        return carry, tree_map(lambda *leaves: np.stack(leaves), outs[0], *outs[1:])

    def _layer(self, block: Module, *args: Any) -> tuple[Any, Any]:
        return check_layer(block, bind(block, self.value)(self, *args))

    def value(self, p: Param | State) -> Array:
        """Return the array of `p` in the present layer."""
        return self._values[id(p)][self._index]

    def name(self, x: Array, name: str) -> Array:
        return x

    def aux(self, name: str, value_B: Array, *, reduce: str = "mean", loss: float = 0.0) -> None:
        check_aux(name, value_B, reduce, loss)
        if reduce == "layers" and not self.training:
            return
        new = Aux(value_B[:, None] if reduce == "layers" else value_B, 1, reduce, loss)
        held = self.auxes.get(name)
        self.auxes[name] = new if held is None else held.join(name, new, np.maximum, np.concatenate)

    def tally(self, module: Module, **values: Array) -> None:
        if not self.training:
            return
        for name, value in values.items():
            at = self.tallies.setdefault(id(vars(source_of(module))[name]), {})
            at[self._index] = at.get(self._index, 0) + value

    def update(self, module: Module, **values: Array) -> None:
        raise UserError(
            f"ops.update({type(module).__name__}, ...)",
            expected="a call from within after_step",
            got="a call in the forward pass",
            do="Use ops.tally to add to a State in the forward pass.",
        )


def _slice(i: int) -> Callable[[Array], Array]:
    return lambda array: array[i]


def _check_axes(what: str, x: Array, axes: Sequence[str | None]) -> None:
    if len(axes) != x.ndim:
        raise UserError(
            what,
            expected=f"one logical axis (or None) for each of the {x.ndim} dimensions of shape {x.shape}",
            got=f"{len(axes)}: {', '.join(map(str, axes))}",
            do="Give one axis per dimension; None for a dimension that is not sharded.",
        )


def _dims(what: str, x: Array, axes: Sequence[str | None], over: Sequence[str]) -> tuple[int, ...]:
    _check_axes(what, x, axes)
    for axis in over:
        if axis not in axes:
            raise choice(f"{what}, over=", axis, [a for a in axes if a])
    return tuple(axes.index(axis) for axis in over)
