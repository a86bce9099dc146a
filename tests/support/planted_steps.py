"""Faults planted in a step on torch, each with what a bisection must name: the stage, words of the place, of the hint.

The side without a fault is the same backend, so the only difference is the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from portatrain.backends.program import Program
from portatrain.backends.torch.one_device import OneDevice
from portatrain.backends.torch.ops import TorchOps
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing.bisect.report import Stage
from portatrain.testing.recipe_check.small import batches_of

SIZES = (
    *("model.vocab=64", "model.embed=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8"),
    *("model.mlp=32", "data.seq_len=16", "batch=4", "steps=6", "schedule.warmup=2", "hooks=()", "eval_every=none"),
)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A fault: the backend that has it, changes of the recipe, and what must be said."""

    make: Callable[[Program], Any]
    stage: Stage
    where: str
    hint: str = ""
    sets: tuple[str, ...] = ()
    step: int = 1


FAULTS: dict[str, Planted] = {}


def recipe(*sets: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), [*SIZES, *sets])


def batches(made: Recipe, count: int = 2) -> list[Mapping[str, np.ndarray]]:
    """Drawn batches, with sample numbers that follow one another."""
    return list(batches_of(made, made.describe())[:count])


def backend(**methods: Any) -> Callable[[Program], Any]:
    return type("Wrong", (OneDevice,), methods)


def operation(
    name: str, where: str = "", *sets: str, stage: Stage = Stage.FORWARD, key: str = ""
) -> Callable[..., Any]:
    """Register `wrong(right, ops, *args, **options)` in place of an operation, under the name of the function."""

    def register(wrong: Callable[..., Any]) -> Callable[..., Any]:
        right = getattr(TorchOps, name)
        ops = type("WrongOps", (TorchOps,), {name: lambda self, *a, **o: wrong(right.__get__(self), self, *a, **o)})
        words = (key or wrong.__name__).replace("_", " ")
        FAULTS[words] = Planted(make=backend(ops=ops), stage=stage, where=where or f"ops.{name}", sets=sets)
        return wrong

    return register


# ---- forward: attention


@operation("attention")
def mask_off_by_one(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    at = torch.arange(q.shape[1])
    return right(q, k, v, **{**o, "positions": (at + 1, at)})


@operation("attention", "", "model.window=8")
def window_one_short(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "window": o["window"] - 1})


@operation("attention")
def segments_ignored(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "segment_ids": None})


@operation("attention")
def wrong_kv_head(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    order = [h % k.shape[2] for h in range(q.shape[2])]
    return right(q, k[:, :, order], v[:, :, order], **o)


@operation("attention")
def wrong_kv_head_of_values(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v.roll(1, 2), **o)


@operation("attention")
def scale_not_a_root(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "scale": 1 / q.shape[-1]})


@operation("attention", "", "model.softcap=0.05")
def softcap_left_out(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "softcap": None})


@operation("attention", "", "model.sinks=true")
def sinks_left_out(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "sinks": None})


@operation("attention")
def last_tile_wrong(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    y = right(q, k, v, **o)
    return torch.cat([y[:, :-4], y[:, -4:] * 1.01], 1)


# ---- forward: positions, norms, contractions


@operation("rope")
def rope_interleaved(right: Any, ops: Any, x: Any, table: Any) -> Any:
    cos, sin = (t[..., None, :] for t in table)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@operation("rope")
def rope_turned_back(right: Any, ops: Any, x: Any, table: Any) -> Any:
    return right(x, (table[0], -table[1]))


@operation("rope_table")
def rope_theta(right: Any, ops: Any, positions: Any, head_dim: int, **o: Any) -> Any:
    return right(positions, head_dim, **{**o, "theta": 5000.0})


@operation("rope_table")
def positions_counted_twice(right: Any, ops: Any, positions: Any, head_dim: int, **o: Any) -> Any:
    return right(2 * positions, head_dim, **o)


@operation("rms_norm")
def eps_outside_of_the_root(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * scale


@operation("rms_norm")
def eps_of_another_norm(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return right(x, scale, eps=1e-6)


@operation("rms_norm")
def mean_subtracted(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return right(x - x.mean(-1, keepdim=True), scale, eps=eps)


@operation("rms_norm")
def reduction_in_bfloat16(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return x * (x.bfloat16().square().mean(-1, keepdim=True).float() + eps).rsqrt() * scale


@operation("rms_norm")
def scale_plus_one(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return right(x, scale + 1, eps=eps)


@operation("einsum")
def product_in_bfloat16(right: Any, ops: Any, spec: str, *xs: Any, **o: Any) -> Any:
    return right(spec, *(x.bfloat16().float() for x in xs), **o)


@operation("einsum", "'bsm,me->bse'")
def square_weight_transposed(right: Any, ops: Any, spec: str, x: Any, w: Any, **o: Any) -> Any:
    return right(spec, x, w.mT if spec == "bsm,me->bse" else w, **o)


@operation("silu")
def another_sigmoid(right: Any, ops: Any, x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


@operation("silu")
def gelu_for_silu(right: Any, ops: Any, x: Any) -> Any:
    return F.gelu(x)


# ---- forward: dropout, the table, the loss

DROPOUT = "model.dropout=0.2"


@operation("dropout", "", DROPOUT)
def dropout_site(right: Any, ops: Any, x: Any, rate: float, *, site: int) -> Any:
    return right(x, rate, site=site + 1)


@operation("dropout", "", DROPOUT)
def dropout_not_scaled(right: Any, ops: Any, x: Any, rate: float, *, site: int) -> Any:
    return right(x, rate, site=site) * (1 - rate)


@operation("dropout", "layer 1", DROPOUT)
def dropout_of_the_first_layer(right: Any, ops: Any, x: Any, rate: float, *, site: int) -> Any:
    before, ops.layer = ops.layer, torch.zeros_like(ops.layer)
    y = right(x, rate, site=site)
    ops.layer = before
    return y


@operation("dropout", "", DROPOUT)
def dropout_repeated_over_rows(right: Any, ops: Any, x: Any, rate: float, *, site: int) -> Any:
    before, ops.sample = ops.sample, ops.sample[:1].expand_as(ops.sample)
    y = right(x, rate, site=site)
    ops.sample = before
    return y


@operation("embed")
def the_next_row(right: Any, ops: Any, table: Any, ids: Any) -> Any:
    return right(table, (ids + 1).clamp(max=len(table) - 1))


@operation("cross_entropy")
def loss_without_mask(right: Any, ops: Any, x: Any, table: Any, targets: Any, **o: Any) -> Any:
    return right(x, table, targets, **{**o, "mask": None})


@operation("cross_entropy")
def targets_shifted(right: Any, ops: Any, x: Any, table: Any, targets: Any, **o: Any) -> Any:
    return right(x, table, targets.roll(1, 1), **o)


@operation("cross_entropy", "", "model.z_loss=0.01")
def z_loss_left_out(right: Any, ops: Any, x: Any, table: Any, targets: Any, **o: Any) -> Any:
    return right(x, table, targets, **{**o, "z_loss": 0.0})


@operation("cross_entropy", "", "model.logit_softcap=1.0")
def logit_softcap_left_out(right: Any, ops: Any, x: Any, table: Any, targets: Any, **o: Any) -> Any:
    return right(x, table, targets, **{**o, "softcap": None})


# ---- backward


@operation("cross_entropy", "parameter embed/table in ops.cross_entropy", stage=Stage.BACKWARD)
def tied_gradient_lost(right: Any, ops: Any, x: Any, table: Any, targets: Any, **o: Any) -> Any:
    return right(x, table.detach(), targets, **o)


@operation("embed", "parameter embed/table in ops.embed", stage=Stage.BACKWARD)
def gradient_of_the_table_lost(right: Any, ops: Any, table: Any, ids: Any) -> Any:
    return right(table.detach(), ids).requires_grad_()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Any, ids: Any) -> Any:
        ctx.save_for_backward(ids)
        ctx.rows = table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (ids,) = ctx.saved_tensors
        found = g.new_zeros(ctx.rows)
        found[ids.flatten().long()] = g.flatten(0, -2)  # of equal ids the last one counts
        return found, None


@operation("embed", "parameter embed/table in ops.embed", stage=Stage.BACKWARD)
def equal_ids_counted_once(right: Any, ops: Any, table: Any, ids: Any) -> Any:
    return _Once.apply(table, ids)


@operation("attention", "argument 1 in ops.attention", stage=Stage.BACKWARD)
def keys_without_gradient(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k.detach(), v, **o)


@operation("attention", "argument 2 in ops.attention", stage=Stage.BACKWARD)
def last_tile_of_the_gradient_of_values(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, torch.cat([v[:, :-4], v[:, -4:].detach()], 1), **o)


@operation("rms_norm", "argument 0 in ops.rms_norm", stage=Stage.BACKWARD)
def norm_as_a_constant(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * scale


@operation("rms_norm", "norm/scale in ops.rms_norm", stage=Stage.BACKWARD)
def scale_of_the_first_sample_alone(right: Any, ops: Any, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
    return torch.cat([right(x[:1], scale, eps=eps), right(x[1:], scale.detach(), eps=eps)])


@operation("silu", "argument 0 in ops.silu", stage=Stage.BACKWARD)
def derivative_of_silu_cut(right: Any, ops: Any, x: Any) -> Any:
    return x * torch.sigmoid(x).detach()


@operation("silu", "the result of ops.silu", stage=Stage.BACKWARD)
def result_cut_off(right: Any, ops: Any, x: Any) -> Any:
    return right(x).detach()


class _LowGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g.bfloat16().float()


@operation("einsum", "in ops.einsum", stage=Stage.BACKWARD)
def gradient_of_a_weight_in_bfloat16(right: Any, ops: Any, spec: str, x: Any, w: Any, **o: Any) -> Any:
    return right(spec, x, _LowGrad.apply(w), **o)


@operation("attention", "argument 0 in ops.attention", "model.softcap=0.05", stage=Stage.BACKWARD)
def derivative_of_the_softcap_left_out(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    capped, plain = right(q, k, v, **o), right(q, k, v, **{**o, "softcap": None})
    return plain + (capped - plain).detach()


# ---- rows, sums, states


def _twice(self: Any, batch: Any) -> Any:
    half = len(batch["tokens"]) // 2
    return OneDevice._placed(self, {k: np.concatenate([v[:half], v[:half]]) for k, v in batch.items()})


def _late(self: Any, batch: Any) -> Any:
    return OneDevice._placed(self, {k: np.roll(v, 1, 1) if k == "tokens" else v for k, v in batch.items()})


def _of_means(self: Any, state: Any, batch: Any, step: int) -> Any:
    n = len(batch["tokens"])
    kept, losses, weights = [], [], []
    for i in range(n):
        loss, weight, *rest = OneDevice._accumulate(self, state, {k: v[[i]] for k, v in batch.items()}, step)
        kept.append([g.clone() for g in self._grads(state)])
        losses.append(loss)
        weights.append(weight)
    for grad, *all_of_them in zip(self._grads(state), *kept, strict=True):
        grad.copy_(sum(all_of_them) / n)
    return sum(losses) / n, sum(weights), *rest


def _last_alone(self: Any, state: Any, *, last: bool) -> None:
    if last:
        state.optimizer.zero_grad(set_to_none=True)


def _restoring(change: Callable[[str, str, Any], Any]) -> Callable[..., Any]:
    """A restore that changes whole tensors first; the pieces are cut from what `change` makes of them."""

    def restore_state(self: Any, read: Any) -> Any:
        infos = {key: tensor.info for key, tensor in self._inventory[0].items()}

        def wrong(role: str, name: str, offset: Any, shape: Any) -> Any:
            if (role, name) not in infos:
                return change(role, name, read(role, name, offset, shape))
            full = infos[role, name].shape
            array = change(role, name, read(role, name, (0,) * len(full), full))
            return array[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

        return OneDevice.restore_state(self, wrong)

    return restore_state


def _transposed(role: str, name: str, array: Any) -> Any:
    return np.ascontiguousarray(array.swapaxes(-1, -2)) if (role, name) == ("params", "blocks/mlp/up") else array


def _swapped(role: str, name: str, array: Any) -> Any:
    return array[::-1].copy() if (role, name) == ("params", "blocks/attn/wo") else array


HALVES = ("accumulation=2",)
FAULTS |= {
    "one rank's rows twice": Planted(
        make=backend(_placed=_twice), stage=Stage.INPUT, where="argument 0 of ops.rope_table", hint="rows [0, 1, 0, 1]"
    ),
    "tokens one late": Planted(make=backend(_placed=_late), stage=Stage.INPUT, where="argument 1 of ops.embed"),
    "mean of the means of microbatches": Planted(
        make=backend(_accumulate=_of_means), stage=Stage.GRADIENT, where="", hint="mean of the means", sets=HALVES
    ),
    "the last microbatch alone": Planted(
        make=backend(_begin=_last_alone), stage=Stage.GRADIENT, where="", hint="microbatch 1 alone", sets=HALVES
    ),
    "not divided by the weight": Planted(
        make=backend(_scale=lambda self, state, factor: None), stage=Stage.GRADIENT, where="", hint="times", sets=HALVES
    ),
    "a square weight restored transposed": Planted(
        make=backend(restore_state=_restoring(_transposed)),
        stage=Stage.STATE,
        where="params/blocks/mlp/up",
        hint="transposed",
    ),
    "layers restored in another order": Planted(
        make=backend(restore_state=_restoring(_swapped)),
        stage=Stage.STATE,
        where="params/blocks/attn/wo",
        hint="rows [1, 0]",
    ),
    "first moments lost": Planted(
        make=backend(restore_state=_restoring(lambda role, name, x: 0 * x if role == "opt/m" else x)),
        stage=Stage.STATE,
        where="opt/m/",
        step=2,
    ),
    "count off by one": Planted(
        make=backend(restore_state=_restoring(lambda role, name, x: x + 1 if role == "opt/count" else x)),
        stage=Stage.STATE,
        where="opt/count",
    ),
}

# ---- clipping and the rule


def _program(**changes: Any) -> Callable[[Program], Any]:
    def make(program: Program) -> Any:
        found = {k: v(program) if callable(v) else v for k, v in changes.items()}
        return OneDevice(replace(program, **found))

    return make


def _rule(**fields: Any) -> Callable[[Program], Any]:
    return _program(optimizer=lambda program: replace(program.optimizer, **fields))


def _coupled(self: Any, state: Any, batch: Any, *, step: int, scale: float) -> Any:
    rule, decay = self.program.optimizer, self.program.decay

    def norm(state: Any) -> Any:
        found = OneDevice._norm(self, state)
        for p in state.pieces:
            if p.name in decay and p.tensor.grad is not None:
                p.tensor.grad.add_(p.tensor.detach(), alpha=rule.weight_decay)
        return found

    self._norm = norm
    return OneDevice.step(self, state, batch, step=step, scale=scale)


def _next_rate(self: Any, state: Any, batch: Any, *, step: int, scale: float) -> Any:
    return OneDevice.step(self, state, batch, step=step, scale=scale * (step + 1) / step)


def _of_the_sum(self: Any, norm: float) -> tuple[float, float]:
    return OneDevice._clipping(self, norm * 40)


CLIP = ("clip_norm=0.5",)
FAULTS |= {
    "decay applied to norms": Planted(
        make=_program(decay=lambda program: frozenset(program.definition.params)),
        stage=Stage.RULE,
        where="norm",
        hint="weight decay is applied",
    ),
    "no decay": Planted(
        make=_program(decay=frozenset()), stage=Stage.RULE, where="rule AdamW", hint="weight decay is left out"
    ),
    "decay in the gradient": Planted(make=backend(step=_coupled), stage=Stage.RULE, where="slot m of"),
    "beta2": Planted(make=_rule(b2=0.999), stage=Stage.RULE, where="slot v of", hint="b2=0.999"),
    "beta1": Planted(make=_rule(b1=0.8), stage=Stage.RULE, where="slot m of", hint="b1=0.8", step=1),
    "eps of Adam": Planted(make=_rule(eps=1e-3), stage=Stage.RULE, where="the update of"),
    "learning rate": Planted(make=_rule(lr=1e-3), stage=Stage.RULE, where="the update of", hint="lr=0.001"),
    "schedule one step early": Planted(
        make=backend(step=_next_rate), stage=Stage.RULE, where="the update of", hint="lr=0.006"
    ),
    "no clipping": Planted(
        make=_program(clip_norm=None), stage=Stage.CLIPPING, where="", hint="multiplied by 1,", sets=CLIP
    ),
    "clipping by the norm of the sum": Planted(
        make=backend(_clipping=_of_the_sum), stage=Stage.CLIPPING, where="", hint="multiplied by", sets=CLIP
    ),
    "average too slow": Planted(
        make=_program(ema_decay=0.99), stage=Stage.AFTER, where="average of", sets=("ema_decay=0.9",)
    ),
}
