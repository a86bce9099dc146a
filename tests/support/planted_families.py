"""Faults planted in steps of other models and optimizers than those of `planted_steps.py`: experts, latent attention,
windows in some layers, images, tied tables, LoRA, accumulation, Lion, Adafactor and Muon.

Each has what a bisection must name: the stage, words of the place, words of the hint. The other side is the same
backend without the fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from portatrain.backends.program import Program
from portatrain.backends.torch.one_device import OneDevice
from portatrain.backends.torch.ops import TorchOps
from portatrain.data import Digits
from portatrain.model.lora import LoRA, factored
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing.bisect.report import Stage
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.gemma import GemmaConfig
from recipes.models.gpt2 import GPT2Config
from recipes.models.mixtral import MixtralConfig
from tests.support.planted_steps import SIZES, backend

_SMALL: Any = {"vocab": 40, "embed": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}
_ROUTED: Any = {**_SMALL, "experts": 4, "chosen": 2, "expert_mlp": 8}


def lm(model: Any = None, *sets: str, **fields: Any) -> Recipe:
    """Return tiny-lm, small, with another model, optimizer or LoRA."""
    made = apply_overrides(load_recipe("tiny-lm"), [*SIZES])
    made = replace(made, **({"model": model} if model else {}), **fields)
    vocab = [] if model is None else [f"model.vocab={model.vocab}"]
    return apply_overrides(made, [*vocab, *sets])


def _experts(*sets: str, **fields: Any) -> Recipe:
    return lm(MixtralConfig(**_ROUTED), *sets, **fields)


def _latent(*sets: str) -> Recipe:
    sizes = {k: v for k, v in _ROUTED.items() if k not in ("head_dim", "kv_heads")}
    more: Any = {"kv_rank": 8, "q_rank": 12, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "dense_layers": 1}
    return lm(DeepseekV3Config(**sizes, **more), *sets)


def _windows() -> Recipe:
    return lm(GemmaConfig(**{**_SMALL, "layers": 3}, window=4, sliding=(True, False, True)))


def _gpt2() -> Recipe:
    return lm(GPT2Config(vocab=40, embed=16, layers=2, heads=2, positions=32))


def _lora(**fields: Any) -> Recipe:
    return lm(lora=LoRA(rank=2, **fields))


def _lora_of_experts() -> Recipe:
    return _experts(lora=LoRA(rank=2, targets=("*/experts/*",)))


def _vit(*sets: str) -> Recipe:
    small = ["model.embed=16", "model.layers=1", "model.heads=2", "model.mlp=16", "batch=4", "schedule.warmup=2"]
    made = apply_overrides(load_recipe("tiny-vit"), [*small, *sets])
    assert isinstance(made.data, Digits)
    return made


@dataclass(frozen=True, kw_only=True)
class Planted:
    """recipe: makes the recipe. make: the backend with the fault. The rest must be said."""

    recipe: Callable[[], Recipe]
    make: Callable[[Program], Any]
    stage: Stage
    where: str
    hint: str = ""
    step: int = 1


FAMILIES: dict[str, Planted] = {}


def operation(
    recipe: Callable[[], Recipe], name: str, where: str = "", *, stage: Stage = Stage.FORWARD, hint: str = ""
) -> Callable[..., Any]:
    """Register `wrong(right, ops, *args, **options)` in place of an operation, under the name of the function."""

    def register(wrong: Callable[..., Any]) -> Callable[..., Any]:
        right = getattr(TorchOps, name)
        ops = type("WrongOps", (TorchOps,), {name: lambda self, *a, **o: wrong(right.__get__(self), self, *a, **o)})
        FAMILIES[wrong.__name__.strip("_").replace("_", " ")] = Planted(
            recipe=recipe, make=backend(ops=ops), stage=stage, where=where or f"ops.{name}", hint=hint
        )
        return wrong

    return register


# ---- experts


@operation(_experts, "experts")
def weights_of_experts_swapped(right: Any, ops: Any, body: Any, x: Any, experts: Any, weights: Any, *p: Any) -> Any:
    return right(body, x, experts, weights.flip(-1), *p)


@operation(_experts, "grouped_matmul", "ops.experts")
def last_expert_gets_nothing(right: Any, ops: Any, x: Any, w: Any) -> Any:
    y = right(x, w)
    return torch.cat([y[: len(y) - int(ops.rows.sizes_X[-1])], 0 * y[len(y) - int(ops.rows.sizes_X[-1]) :]])


@operation(_experts, "experts", "argument 2 in ops.experts", stage=Stage.BACKWARD)
def router_without_gradient(right: Any, ops: Any, body: Any, x: Any, experts: Any, weights: Any, *p: Any) -> Any:
    return right(body, x, experts, weights.detach(), *p)


@operation(_experts, "experts", "experts/down in ops.experts", stage=Stage.BACKWARD)
def down_of_the_first_expert_twice(right: Any, ops: Any, body: Any, x: Any, e: Any, w: Any, *p: Any) -> Any:
    more = torch.zeros_like(p[2])
    more[0] = 1
    return right(body, x, e, w, *p[:2], p[2] + more * (p[2] - p[2].detach()))


@operation(_experts, "top_k")
def the_second_expert_is_the_last(right: Any, ops: Any, x: Any, k: int) -> Any:
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., [0, -1]], indices[..., [0, -1]].int()


@operation(lambda: _experts("model.balance_loss=0.1"), "aux", "ops.mean in blocks/mlp/router", stage=Stage.BACKWARD)
def loss_of_balance_left_out(right: Any, ops: Any, name: str, value: Any, *, loss: float = 0.0, **o: Any) -> Any:
    return right(name, value, loss=0.0, **o)


# ---- latent attention, windows


@operation(_latent, "rope", "ops.rope in")
def shared_key_a_position_late(right: Any, ops: Any, x: Any, table: Any) -> Any:
    return right(x, tuple(t.roll(1, 0) for t in table)) if x.shape[2] == 1 else right(x, table)


@operation(_latent, "split")
def parts_of_a_query_swapped(right: Any, ops: Any, x: Any, parts: Any, **o: Any) -> Any:
    return right(x, parts, **o)[::-1]


@operation(_windows, "attention", "ops.attention in")
def window_in_every_layer(right: Any, ops: Any, q: Any, k: Any, v: Any, **o: Any) -> Any:
    return right(q, k, v, **{**o, "window": 4})


@operation(_gpt2, "gelu")
def erf_for_tanh(right: Any, ops: Any, x: Any, *, approximate: bool = False) -> Any:
    return F.gelu(x)


@operation(_gpt2, "layer_norm")
def variance_by_n_less_one(right: Any, ops: Any, x: Any, scale: Any = None, bias: Any = None, **o: Any) -> Any:
    mean, std = x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + o["eps"]).sqrt()
    return (x - mean) / std * scale + bias


# ---- LoRA


@operation(_lora, "einsum", "ops.einsum('bsz,zhd->bshd')", stage=Stage.BACKWARD, hint="cut off")
def factor_cut_off(right: Any, ops: Any, spec: Any, *args: Any, **o: Any) -> Any:
    """In the first layer, where a step can only be seen to depend on the factor once it is no longer zero."""
    found = right(spec, *args, **o)
    return found.detach() if "z" in spec.split("->")[0].split(",")[0] and int(ops.layer or 0) == 0 else found


@operation(_lora_of_experts, "experts", "gate/lora_b in ops.experts", stage=Stage.BACKWARD, hint="cut off")
def factor_of_experts_cut_off(right: Any, ops: Any, body: Any, *args: Any) -> Any:
    body, params = factored(body, args[3:])
    return right(body, *args[:3], *(p.detach() if i == 2 else p for i, p in enumerate(params)))


# ---- images


@operation(_vit, "layer_norm", "norm/bias in ops.layer_norm", stage=Stage.BACKWARD)
def bias_of_a_norm_without_gradient(right: Any, ops: Any, x: Any, scale: Any = None, bias: Any = None, **o: Any) -> Any:
    return right(x, scale, bias.detach(), **o)


@operation(_vit, "mean")
def mean_over_one_patch_less(right: Any, ops: Any, x: Any, axes: Any, *, over: Any) -> Any:
    return right(x[:, 1:], axes, over=over) if "seq" in over else right(x, axes, over=over)


@operation(_vit, "bias", "bias in ops.bias", stage=Stage.BACKWARD)
def _bias_of_the_first_patch(right: Any, ops: Any, x: Any, p: Any) -> Any:
    return right(x, p.detach()) + F.pad(
        (p - p.detach()).expand_as(x[:, :1]), (0, 0) * (x.ndim - 2) + (0, x.shape[1] - 1)
    )


def _mirrored(self: Any, batch: Any) -> Any:
    return OneDevice._placed(self, {k: v[:, :, ::-1].copy() if k == "image" else v for k, v in batch.items()})


# ---- accumulation, states, the average


def _first_samples(self: Any, batch: Any) -> Any:
    first = {**batch, "sample": batch["sample"] % 2} if "sample" in batch else batch
    return OneDevice._placed(self, first)


def _average_first(self: Any, state: Any, decay: float) -> None:
    for i, average in state.ema.items():
        average.lerp_(self._before[i], 1 - decay)


def _remembers(self: Any, state: Any, batch: Any, *, step: int, scale: float, **o: Any) -> Any:
    self._before = {i: state.pieces[i].tensor.detach().float().clone() for i in state.ema}
    return OneDevice.step(self, state, batch, step=step, scale=scale, **o)


def _other_sign(self: Any, state: Any, step: int, tallies: Any) -> None:
    OneDevice._after(self, state, step, {k: v.mean() - (v - v.mean()) for k, v in tallies.items()})


# ---- rules


def program(**changes: Any) -> Callable[[Program], Any]:
    def make(program: Program) -> Any:
        found = {k: v(program) if callable(v) else v for k, v in changes.items()}
        return OneDevice(replace(program, **found))

    return make


def rule(change: Callable[[Any], Any]) -> Callable[[Program], Any]:
    return program(optimizer=lambda program: change(program.optimizer))


class _Uncorrected(AdamW):
    def step(self, xp: Any, *, count: Any, **o: Any) -> Any:
        return super().step(xp, count=count * 0 + 1e9, **o)


class _Summed(Muon):
    def step(self, xp: Any, *, slots: Any, grad: Any, **o: Any) -> Any:
        return super().step(xp, slots=slots, grad=grad / (1 - self.momentum), **o)


class _Everything(Muon):
    def rule_for(self, info: Any) -> Any:
        return self if len(info.shape) - info.batch_dims == 2 else self.adamw


class _OneLayer(Adafactor):
    """Clips by the largest element and not by the root mean square."""

    def step(self, xp: Any, **o: Any) -> Any:
        return replace(Adafactor(lr=self.lr), clip=0.5).step(xp, **o)


def _as(cls: type) -> Callable[[Any], Any]:
    return lambda old: cls(**{f.name: getattr(old, f.name) for f in dataclasses.fields(old)})


MODELS: dict[str, Callable[[], Recipe]] = {
    "experts": _experts,
    "experts with losses": lambda: _experts("model.balance_loss=0.1", "model.router_z_loss=0.01"),
    "latent attention": _latent,
    "windows in some layers": _windows,
    "learned positions": _gpt2,
    "images": _vit,
    "LoRA": _lora,
    "LoRA on experts": _lora_of_experts,
    "LoRA on queries": lambda: _lora(targets=("*/wq",)),
    "a frozen table": lambda: lm(None, "frozen=('embed/*',)"),
    "norms and routers frozen": lambda: _latent("frozen=('*norm/scale','*/router/*')"),
    "accumulation": lambda: lm(None, "accumulation=2", "model.dropout=0.2"),
    "Lion": lambda: lm(optimizer=Lion(lr=1e-3)),
    "Adafactor": lambda: lm(optimizer=Adafactor(lr=1e-2)),
    "Adafactor, relative": lambda: lm(optimizer=Adafactor(lr=1e-2, relative=True)),
    "Muon": lambda: lm(optimizer=Muon(lr=1e-2)),
    "Muon on experts": lambda: _experts(optimizer=Muon(lr=1e-2)),
    "SGD": lambda: lm(optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True)),
}
"""Recipes for clean pairs."""


def _other_alpha(alpha: float) -> Callable[[Program], Any]:
    from portatrain.backends.program import make_program

    return lambda program: OneDevice(make_program(_lora(alpha=alpha)))


def _row(recipe: Any, make: Any, stage: Stage, where: str, hint: str = "", step: int = 1) -> Planted:
    return Planted(recipe=recipe, make=make, stage=stage, where=where, hint=hint, step=step)


_HALVES = ("accumulation=2", "model.dropout=0.2")
FAMILIES |= {
    "images mirrored": _row(_vit, backend(_placed=_mirrored), Stage.INPUT, "argument 0 of ops."),
    "samples of the first microbatch": _row(
        lambda: lm(None, *_HALVES), backend(_placed=_first_samples), Stage.FORWARD, "ops.dropout"
    ),
    "average before the update": _row(
        lambda: lm(None, "ema_decay=0.9"), backend(_average=_average_first, step=_remembers), Stage.AFTER, "average of"
    ),
    "balance moves the other way": _row(_latent, backend(_after=_other_sign), Stage.AFTER, "router/balance"),
    "factors scaled by another alpha": _row(
        lambda: _lora(alpha=4.0), _other_alpha(8.0), Stage.INPUT, "argument 0 of ops.einsum", "plain arithmetic"
    ),
    "weights under LoRA trained": _row(
        _lora,
        program(trainable=lambda program: frozenset(program.definition.params)),
        Stage.GRADIENT,
        "not trained by the recipe",
    ),
    "a frozen table trained": _row(
        lambda: lm(None, "frozen=('embed/*',)"),
        program(trainable=lambda program: frozenset(program.definition.params)),
        Stage.GRADIENT,
        "not trained by the recipe",
    ),
    "one norm forgotten by the optimizer": _row(
        lm,
        program(trainable=lambda program: frozenset(program.definition.params) - {"final_norm/scale"}),
        Stage.GRADIENT,
        "final_norm/scale",
    ),
    "no correction of the bias": _row(
        lm, rule(_as(_Uncorrected)), Stage.RULE, "the update of", "without the corrections of the first steps"
    ),
    "Lion with its rates swapped": _row(
        lambda: lm(optimizer=Lion(lr=1e-3)), rule(lambda r: replace(r, b1=r.b2, b2=r.b1)), Stage.RULE, "slot m of"
    ),
    "Lion with another b1": _row(
        lambda: lm(optimizer=Lion(lr=1e-3)), rule(lambda r: replace(r, b1=0.5)), Stage.RULE, "the update of", step=2
    ),
    "Adafactor clipped earlier": _row(
        lambda: lm(optimizer=Adafactor(lr=1e-2)), rule(_as(_OneLayer)), Stage.RULE, "the update of"
    ),
    "Adafactor relative": _row(
        lambda: lm(optimizer=Adafactor(lr=1e-2)), rule(lambda r: replace(r, relative=True)), Stage.RULE, "the update of"
    ),
    "Muon with four iterations": _row(
        lambda: lm(optimizer=Muon(lr=1e-2)),
        rule(lambda r: replace(r, coefficients=r.coefficients[1:])),
        Stage.RULE,
        "the update of",
    ),
    "Muon without Nesterov": _row(
        lambda: lm(optimizer=Muon(lr=1e-2)),
        rule(lambda r: replace(r, nesterov=False)),
        Stage.RULE,
        "the update of",
        step=2,
    ),
    "Muon sums its gradients": _row(lambda: lm(optimizer=Muon(lr=1e-2)), rule(_as(_Summed)), Stage.RULE, "slot m of"),
    "Muon's AdamW with another rate": _row(
        lambda: lm(optimizer=Muon(lr=1e-2)),
        rule(lambda r: replace(r, adamw=AdamW(lr=1e-3))),
        Stage.RULE,
        "the update of",
        "adamw.lr=0.001",
    ),
    "SGD with Nesterov": _row(
        lambda: lm(optimizer=SGD(lr=0.1, momentum=0.9)),
        rule(lambda r: replace(r, nesterov=True)),
        Stage.RULE,
        "the update of",
        "nesterov=True",
    ),
}
