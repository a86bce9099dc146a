"""Bounds of rounding, derived from what a model is: honest moves of any model pass the continuity check, wrong ones do
not."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from portatrain.backends import rounding
from portatrain.backends.base import missing
from portatrain.optim import AdamW
from portatrain.recipe import load_recipe
from portatrain.training import arrival, continuity
from tests.support.moves import Move, Values, small

needs_both = pytest.mark.skipif(bool(missing("jax") or missing("torch")), reason="a move needs jax and torch")


def recipe_of(precision: str, qk_norm: bool, head_dim: int, layers: int, rank: int, rule: str) -> list[str]:
    lora = ["lora=LoRA", f"lora.rank={rank}"] if rank else []
    sizes = [f"model.qk_norm={qk_norm}", f"model.head_dim={head_dim}", f"model.layers={layers}"]
    return [f"precision={precision}", *sizes, *lora, f"optimizer={rule}"]


TABLE = [
    case
    for case in itertools.product(
        ("fp32", "bf16"), (False, True), (2, 4, 16), (1, 4, 16), (0, 4, 32), ("AdamW", "Lion", "SGD", "Muon")
    )
    if not (case[4] and case[5] == "Muon")  # factors so thin leave Muon nothing to orthogonalise
]
GENERATED = random.Random(11).sample(TABLE, 24)


def test_the_longest_sum_of_a_decoder() -> None:
    definition = small().describe()
    assert rounding.longest_sum(definition, 16) == 256  # the vocabulary, in the gradient of the last activations
    assert rounding.longest_sum(definition, 4096) == 4096
    assert rounding.operations(definition) == 4 * 9 + 2


def test_positions_are_tokens_or_patches() -> None:
    tokens = {"tokens": np.zeros((2, 8, 32)), "sample": np.zeros((2, 8))}
    assert rounding.positions_in(small().describe(), tokens, microbatches=True) == 2 * 8 * 32
    images = {"image": np.zeros((16, 8, 8, 1)), "label": np.zeros(16)}
    assert rounding.positions_in(load_recipe("tiny-vit").describe(), images) == 16 * 4 * 4


def test_bounds_follow_depth_length_and_precision() -> None:
    """They are what a model is: more layers, longer sums and fewer digits make them larger, by square roots."""
    one, four = (small(f"model.layers={n}").describe() for n in (1, 4))
    of = continuity.Bounds.of
    ratio = np.sqrt(rounding.operations(four) / rounding.operations(one))
    assert of(four, "bf16", 128).grad == pytest.approx(ratio * of(one, "bf16", 128).grad)
    assert of(one, "fp32", 1 << 20).grad == pytest.approx(32 * of(one, "fp32", 1 << 10).grad, rel=0.05)
    assert 1e3 < of(one, "bf16", 128).grad / of(one, "fp32", 128).grad < 2.0**16


@pytest.mark.parametrize("seen", ["loss", "grad", "update"])
def test_a_difference_that_rounding_makes_is_measured(seen: str) -> None:
    """Only after the derived bounds failed, only for figures that pass through the model, and the state is its own."""
    bounds = continuity.Bounds.of(small("model.layers=1").describe(), "fp32", 128)
    seeds: list[int] = []

    def probe(loss: float = 1.0, state: float = 1.0, grad: float = 1.0, update: float = 1.0) -> dict[str, Any]:
        norms = {"params/a": state, "grad/a": grad, "update/a": update}
        exact = {"step": 1, "applied": 1, "data": {}, "rng": {}, "schedule": {}}
        return {**exact, "probe": {"losses": [loss, 1.0], "norms": norms}}

    def judged(moved: float, changed: list[str] | None = None, **here: float) -> str:
        seeds.clear()

        def again(seed: int) -> dict[str, Any]:
            seeds.append(seed)
            return probe(**{**here, seen: here.get(seen, 1.0) * (1 + moved)})

        return arrival.judge(probe(), probe(**here), bounds, again, changed)["verdict"]

    off = {seen: 1.0 + 1e-3}
    assert judged(0.0) == "continuous" and not seeds
    assert judged(1e-3, **off) == "continuous" and len(set(seeds)) == continuity.MEASURED_DRAWS
    assert judged(1e-5, **off) == "broken"
    assert judged(1.0, **off, state=1.0 + 1e-5) == "broken" and not seeds
    assert judged(1.0, ["params/a"], **off) == "broken" and not seeds


@pytest.mark.skipif(bool(missing("jax")), reason="jax is not installed")
def test_sums_of_a_probe_do_not_drift() -> None:
    """Elements that are alike, as after the first step of Adam, round in the same direction: in float32 these sums were
    off by up to 4e-7, in a LoRA run of the shipped sizes by 2.1e-6."""
    import jax

    from portatrain.backends.jax.probe import norms

    tensor = dataclasses.make_dataclass("T", ["key", "info"])
    info = dataclasses.make_dataclass("I", ["stack_dims"])(0)
    for less, rest in itertools.product((1e-7, 3e-7, 1e-6, 1e-5), range(6)):
        array = np.full((64, 32), np.float32(1e-3 * (1 - less * (1 + rest / 3))))
        array[0, 0] = 1e-3
        found = jax.jit(lambda x: norms({}, [(tensor(("opt/m", "w"), info), x)], {}, {}, wide=True))(array)
        want = np.linalg.norm(array.astype(np.float64))
        assert abs(float(found["opt/m/w"]) / want - 1) <= 2.0**-24


@needs_both
@pytest.mark.parametrize(
    ("case", "step"),
    [(("fp32", False, 16, 1, 32, "AdamW"), 1), (("bf16", True, 2, 2, 0, "AdamW"), 1)],
    ids=["LoRA after its first step", "bf16 with norms over two elements"],
)
def test_an_honest_move_is_accepted(case: Any, step: int) -> None:
    move = Move(small(*recipe_of(*case)), step)
    assert (found := move.verdict())["verdict"] == "continuous", found
    _wrong_moves_are_refused(move, case[0])


@needs_both
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c,
            marks=pytest.mark.soak if i % 4 else pytest.mark.hand if i % 12 else pytest.mark.full,
            id=" ".join(map(str, c)),
        )
        for i, c in enumerate(GENERATED)
    ],
)
def test_generated_honest_moves_are_accepted(case: Any) -> None:
    for step in (1, 4):
        move = Move(small(*recipe_of(*case)), step)
        assert (found := move.verdict())["verdict"] == "continuous", found
    _wrong_moves_are_refused(move, case[0])


def _wrong_moves_are_refused(move: Move, precision: str) -> None:
    def scaled(role: str, by: float) -> Any:
        def mutate(values: Values) -> None:
            name = next(n for r, n in sorted(values) if r == role and np.any(values[r, n]))
            values[role, name][...] *= np.float32(by)

        return mutate

    slots = [role for role in {r for r, _ in move.values} if role.startswith("opt/") and role != "opt/count"]
    for role in ("params", *slots):
        for by in (0.0, 0.9, 1 + 1e-5):
            assert (found := move.verdict(scaled(role, by)))["verdict"] == "broken", (role, by, found)
    if precision == "fp32" and isinstance(move.recipe.optimizer, AdamW):
        for changes in ({"lr": move.recipe.optimizer.lr * 1.01}, {"b1": 0.85}, {"b2": 0.99}):
            rule = dataclasses.replace(move.recipe.optimizer, **changes)
            if move.step > 1 or "lr" in changes:
                assert move.verdict(changes={"optimizer": rule})["verdict"] == "broken", changes
