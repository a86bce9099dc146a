"""Every rule against the oracle in float64; that the oracle tells right from wrong; slots and choices."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from portatrain.backends.reference import optim as reference
from portatrain.errors import UserError
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule, decays_by_default
from tests.support.optim_cases import MUTANTS, RULES, SCALE, TENSORS, Tensor, randoms, update, zeros

STEPS = 5
# Two float64 evaluations of up to 12 Newton-Schulz steps, whose gain is at most 3.4445**5 = 485, and of
# sums of up to 48 terms: some 500 * 48 * 2**-53 = 3e-12 at worst and 1e-13 as a rule, of the scale.
CLOSE = 1e-12


def worst_difference(rule: Rule, oracle: Rule, info: Tensor, *, decay: bool) -> float:
    """Largest difference of parameter and slots from the oracle's over five steps, each of its own scale."""
    param, grads = randoms(info, seed=1, steps=STEPS)
    slots, expected, expected_slots = zeros(rule, info), param, reference.init(oracle, info)
    assert {k: v.shape for k, v in slots.items()} == {k: v.shape for k, v in expected_slots.items()}
    worst = 0.0
    for count, grad in enumerate(grads, start=1):
        param, slots = update(
            np, rule, info, param, grad, slots, scale=np.float64(SCALE), count=np.float64(count), decay=decay
        )
        expected, expected_slots = reference.step(
            oracle, info, param=expected, grad=grad, slots=expected_slots, scale=SCALE, count=count, decay=decay
        )
        assert set(slots) == set(expected_slots)
        for got, want in [(param, expected), *((slots[k], expected_slots[k]) for k in slots)]:
            assert got.dtype == np.float64 and got.shape == want.shape
            worst = max(worst, float(np.max(np.abs(got - want)) / np.max(np.abs(want))))
    return worst


@pytest.mark.parametrize("decay", [True, False], ids=["decay", "no-decay"])
@pytest.mark.parametrize("info", TENSORS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", RULES)
def test_rule_equals_oracle(name: str, info: Tensor, decay: bool) -> None:
    assert worst_difference(RULES[name], RULES[name], info, decay=decay) < CLOSE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_oracle_sees_mutant(mutant: str) -> None:
    name, wrong = MUTANTS[mutant]
    stacked = next(t for t in TENSORS if t.name == "blocks/up")
    assert worst_difference(RULES[name], RULES[name], stacked, decay=True) < CLOSE
    assert worst_difference(wrong, RULES[name], stacked, decay=True) > 1e6 * CLOSE


@pytest.mark.parametrize("name", RULES)
def test_batch_axes_are_independent_tensors(name: str) -> None:
    """A stack of layers takes the very steps that its layers take alone."""
    rule = RULES[name]
    whole = next(t for t in TENSORS if t.name == "blocks/wq")
    alone = Tensor(name=whole.name, shape=whole.shape[1:], axes=whole.axes[1:], fan_in_axes=whole.fan_in_axes)
    param, (grad,) = randoms(whole, seed=2, steps=1)
    common = {"scale": np.float64(1), "count": np.float64(1), "decay": True}
    stacked, _ = update(np, rule, whole, param, grad, zeros(rule, whole), **common)
    for layer in range(whole.shape[0]):
        one, _ = update(np, rule, alone, param[layer], grad[layer], zeros(rule, alone), **common)
        np.testing.assert_allclose(stacked[layer], one, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("info", TENSORS, ids=lambda t: t.name)
def test_zero_gradients_give_finite_steps(name: str, info: Tensor) -> None:
    """Rows that never see a gradient (an embedding's) must not become NaN, in float32 least of all."""
    rule = RULES[name]
    param = np.ones(info.shape, np.float32)
    slots = zeros(rule, info, np.float32)
    for count in range(1, 4):
        param, slots = update(
            np,
            rule,
            info,
            param,
            np.zeros(info.shape, np.float32),
            slots,
            scale=np.float32(1),
            count=np.float32(count),
            decay=False,
        )
    assert np.all(param == 1) and all(np.isfinite(v).all() for v in slots.values())


def test_adafactor_survives_rows_without_gradient() -> None:
    """One live row among dead ones: r k / mean(r) would leave float32's range if it were formed."""
    rule, info = RULES["adafactor"], Tensor(name="e", shape=(4, 3), axes=("vocab", "embed"), fan_in_axes=0)
    grad = np.zeros((4, 3), np.float32)
    grad[1] = 1e6
    param, _ = update(
        np,
        rule,
        info,
        np.ones((4, 3), np.float32),
        grad,
        zeros(rule, info, np.float32),
        scale=np.float32(1),
        count=np.float32(1),
        decay=False,
    )
    assert np.isfinite(param).all() and np.all(param[[0, 2, 3]] == 1) and np.all(param[1] < 1)


# --- which rule takes what, and what it keeps ----------------------------------------------------

BIAS_2D = Tensor(name="attn/q_bias", shape=(4, 8), axes=("heads", "head_dim"), fan_in_axes=0)


@pytest.mark.parametrize(
    ("tensor", "muon", "decays", "factors"),
    [
        ("norm/scale", False, False, None),
        ("mlp/up", True, True, {"v_row": ("embed",), "v_col": ("mlp",)}),
        ("mlp/down", True, True, {"v_row": ("mlp",), "v_col": ("embed",)}),
        ("embedding", False, True, {"v_row": ("vocab",), "v_col": ("embed",)}),
        ("head", False, True, {"v_row": ("embed",), "v_col": ("vocab",)}),
        ("gate", True, True, None),
        ("blocks/norm", False, False, None),
        ("blocks/depth", False, False, None),
        ("blocks/up", True, True, {"v_row": ("layers", "embed"), "v_col": ("layers", "mlp")}),
        (
            "blocks/experts",
            True,
            True,
            {"v_row": ("layers", "experts", "embed"), "v_col": ("layers", "experts", "mlp")},
        ),
        ("blocks/wq", True, True, {"v_row": ("layers", "embed"), "v_col": ("layers", "heads", "head_dim")}),
        ("blocks/wo", True, True, {"v_row": ("layers", "heads", "head_dim"), "v_col": ("layers", "embed")}),
    ],
)
def test_choices(tensor: str, muon: bool, decays: bool, factors: dict[str, tuple[str, ...]] | None) -> None:
    info = next(t for t in TENSORS if t.name == tensor)
    rule = RULES["muon"]
    assert isinstance(rule, Muon)
    assert rule.rule_for(info) is (rule if muon else rule.adamw)
    assert set(rule.slots(info)) == ({"m"} if muon else {"m", "v"})
    assert decays_by_default(info) is decays
    slots = Adafactor(lr=1.0).slots(info)
    assert {k: s.axes for k, s in slots.items()} == (factors or {"v": info.axes})
    sizes = dict(zip(info.axes, info.shape, strict=True))
    assert all(s.shape == tuple(sizes[a] for a in s.axes) and s.dtype == "float32" for s in slots.values())


def test_a_bias_of_two_axes_does_not_decay() -> None:
    assert not decays_by_default(BIAS_2D)


@pytest.mark.parametrize("rule", [AdamW(lr=1.0), Lion(lr=1.0), SGD(lr=1.0), Adafactor(lr=1.0)])
def test_rules_take_every_tensor(rule: Rule) -> None:
    assert all(rule.rule_for(info) is rule for info in TENSORS)


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert SGD(lr=1.0).slots(TENSORS[0]) == {} and set(SGD(lr=1.0, momentum=0.9).slots(TENSORS[0])) == {"m"}


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "fields", "named"),
    [
        (cls, {"lr": 1e-3, **bad}, next(iter(bad)))
        for cls in (AdamW, Lion, SGD, Adafactor, Muon)
        for bad in (
            {"lr": 0.0},
            {"lr": -1.0},
            {"lr": float("nan")},
            {"lr": float("inf")},
            {"lr": "1e-3"},
            {"lr": True},
            {"weight_decay": -0.1},
            {"weight_decay": None},
        )
    ]
    + [
        (cls, {"lr": 1e-3, field: value}, field)
        for cls, field, values in (
            (AdamW, "b1", (1.0, -0.1)),
            (AdamW, "b2", (1.0, 1.5)),
            (AdamW, "eps", (0.0, -1e-8)),
            (Lion, "b1", (1.0,)),
            (Lion, "b2", (-0.5,)),
            (SGD, "momentum", (1.0, -0.1)),
            (SGD, "nesterov", (True, 1)),
            (Adafactor, "decay_rate", (0.0, 1.1)),
            (Adafactor, "clip", (0.0,)),
            (Adafactor, "eps1", (0.0, 1e-38, 2.0)),
            (Adafactor, "eps2", (0.0,)),
            (Adafactor, "relative", ("yes",)),
            (Muon, "momentum", (1.0,)),
            (Muon, "eps", (0.0,)),
            (Muon, "adamw", (None, SGD(lr=1.0))),
            (Muon, "coefficients", ((), (1.0, 2.0, 3.0), ((1.0, 2.0),), ((1.0, 2.0, float("nan")),))),
        )
        for value in values
    ],
)
def test_bad_fields_are_user_errors(cls: type[Rule], fields: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=rf"\b{named}\b") as caught:
        cls(**fields)  # type: ignore[arg-type]
    assert caught.value.expected and caught.value.got and caught.value.do


def test_import_loads_no_array_package() -> None:
    code = (
        "import sys, portatrain.optim, portatrain.optim.schedules; "
        "print(sorted({'numpy', 'jax', 'torch', 'optax', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
