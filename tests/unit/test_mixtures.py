"""The layers of a mixture of experts on the oracle, beside plain NumPy, token by token; and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import Context
from portatrain.backends.reference import ReferenceOps, forward, initial
from portatrain.backends.reference.run import Forward, after_step, initial_states
from portatrain.errors import UserError
from portatrain.model.layers import Experts, GatedMLP, MixtureMLP, Router
from portatrain.model.module import Module, Param, describe

RNG = np.random.default_rng(0)


class Losing(Module):
    """Gives the sum of a layer's results as the loss, so that auxiliary losses count."""

    def __init__(self, layer: Module) -> None:
        self.layer = layer
        self.unused = Param(embed=1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        found = self.layer(ops, batch["x"])
        y_BSC = found[1] if isinstance(found, tuple) else found
        return found, ops.loss(y_BSC.sum((1, 2)), batch["x"].sum((1, 2)) * 0 + 1)


def run(layer: Module, x: np.ndarray, **states: np.ndarray) -> tuple[Forward, dict[str, np.ndarray]]:
    definition = describe(Losing(layer))
    params = {n: a + 0.3 * RNG.normal(size=a.shape) for n, a in initial(definition).items()}
    named = initial_states(definition) | {f"layer/{name}": value for name, value in states.items()}
    found = forward(definition, params, {"x": x}, Context(training=True), states=named)
    return found, {name.removeprefix("layer/"): array for name, array in params.items()}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def due(
    p: dict[str, np.ndarray], x_E: np.ndarray, o: dict[str, Any], balance: np.ndarray
) -> tuple[list[int], list[float]]:
    """The experts of one token and their weights, as the papers state them."""
    z = x_E @ p["weight"] + p.get("bias", 0.0)
    s = 1 / (1 + np.exp(-z)) if o.get("scores") == "sigmoid" else softmax(z)
    ranks = list(s + balance)
    if (groups := o.get("groups", 1)) > 1:
        size = len(ranks) // groups
        best = [sum(sorted(ranks[g * size : (g + 1) * size])[-o.get("group_best", 2) :]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -best[g])[: o["chosen_groups"]]
        ranks = [r if i // size in kept else -np.inf for i, r in enumerate(ranks)]
    experts = sorted(range(len(ranks)), key=lambda i: -ranks[i])[: o["chosen"]]
    weights = np.array([s[i] for i in experts])
    if o.get("normalise", True):
        weights = weights / weights.sum()
    return experts, list(weights * o.get("scale", 1.0))


@pytest.mark.parametrize(
    "options",
    [
        {"chosen": 1},
        {"chosen": 3, "bias": True},
        {"chosen": 2, "normalise": False},
        {"chosen": 2, "scores": "sigmoid", "balance_rate": 0.1, "scale": 2.5},
        {"chosen": 3, "scores": "sigmoid", "groups": 4, "chosen_groups": 2, "balance_rate": 0.1},
        {"chosen": 2, "groups": 2, "chosen_groups": 1, "group_best": 1, "normalise": False},
        {"chosen": 8},
    ],
    ids=str,
)
def test_router(options: dict[str, Any]) -> None:
    x, balance = RNG.normal(size=(2, 5, 6)), 0.2 * RNG.normal(size=8)
    given = {"balance": balance} if options.get("balance_rate") else {}
    found, p = run(Router(embed=6, experts=8, **options), x, **given)
    (experts_BSC, weights_BSC), _ = found.value
    for b, s in np.ndindex(2, 5):
        experts, weights = due(p, x[b, s], options, balance if given else np.zeros(8))
        assert list(experts_BSC[b, s]) == experts
        np.testing.assert_allclose(weights_BSC[b, s], weights, rtol=1e-12)


def test_normalised_softmax_is_a_softmax_of_the_chosen_logits() -> None:
    """So one router is that of Mixtral, which divides, and that of gpt-oss, which chooses first."""
    x = RNG.normal(size=(2, 5, 6))
    found, p = run(Router(embed=6, experts=8, chosen=3, bias=True), x)
    (experts_BSC, weights_BSC), _ = found.value
    logits = np.take_along_axis(x @ p["weight"] + p["bias"], experts_BSC, -1)
    np.testing.assert_allclose(weights_BSC, softmax(logits), rtol=1e-12)


def test_losses_and_statistics() -> None:
    x = RNG.normal(size=(3, 7, 6))
    found, p = run(Router(embed=6, experts=4, chosen=2, balance_loss=0.5, z_loss=0.25), x)
    (experts_BSC, _), loss = found.value
    z = x @ p["weight"]
    scores, lse = softmax(z), np.log(np.exp(z).sum(-1))
    share_BX = np.stack([(experts_BSC == i).sum((1, 2)) for i in range(4)], -1) / (7 * 2)
    balance_B, z_B = 4 * (share_BX * scores.mean(1)).sum(-1), (lse**2).mean(1)
    np.testing.assert_allclose(found.auxes["router_balance"].value_B, balance_B, rtol=1e-12)
    np.testing.assert_allclose(found.auxes["router_z"].value_B, z_B, rtol=1e-12)
    entropy = -(scores * np.log(scores)).sum(-1).mean(1)
    np.testing.assert_allclose(found.auxes["router_entropy"].value_B, entropy, rtol=1e-12)
    np.testing.assert_array_equal(found.auxes["router_largest_share"].value_B, share_BX.max(-1))
    np.testing.assert_array_equal(found.auxes["router_loads"].value_B[:, 0], share_BX * 14)
    np.testing.assert_allclose(found.auxes["router_entropies"].value_B[:, 0], entropy, rtol=1e-12)
    expected = loss.sum + 0.5 * balance_B.sum() + 0.25 * z_B.sum()
    np.testing.assert_allclose(found.auxes["router_balance"].loss, 0.5)
    np.testing.assert_allclose(
        loss.sum + sum(a.loss * a.value_B.sum() for a in found.auxes.values()), expected, rtol=1e-12
    )


def test_an_even_load_has_balance_one() -> None:
    """Four tokens, one for each expert, with scores that are all but certain."""
    layer = Losing(Router(embed=4, experts=4, chosen=1))
    definition = describe(layer)
    params = {n: np.zeros(i.shape) for n, i in definition.params.items()} | {"layer/weight": 50 * np.eye(4)}
    for x, balance in ((np.eye(4)[None], 1.0), (np.eye(4)[[[2, 2, 2, 2]]], 4.0)):
        found = forward(definition, params, {"x": x})
        np.testing.assert_allclose(found.auxes["router_balance"].value_B, balance, rtol=1e-9)


def test_the_balance_moves_against_the_load() -> None:
    router = Router(embed=3, experts=3, chosen=1, balance_rate=0.1)
    definition = describe(Losing(router))
    params = {n: np.zeros(i.shape) for n, i in definition.params.items()} | {"layer/weight": np.eye(3)}
    tokens = np.eye(3)[[[0, 0, 0, 1], [0, 1, 2, 2]]]  # loads 4, 2, 2; then one of them moves
    found = forward(definition, params, {"x": tokens}, Context(training=True))
    np.testing.assert_array_equal(found.states["layer/load"], [4, 2, 2])
    states = after_step(definition, found.states)
    np.testing.assert_allclose(states["layer/balance"], [-0.1, 0.1, 0.1])
    np.testing.assert_array_equal(states["layer/load"], 0)


@pytest.mark.parametrize("gate", [False, True])
def test_mixture(gate: bool) -> None:
    x = RNG.normal(size=(2, 5, 6))
    router = Router(embed=6, experts=4, chosen=2)
    layer = MixtureMLP(
        router=router, experts=Experts(embed=6, mlp=7, experts=4), shared=GatedMLP(embed=6, mlp=3), shared_gate=gate
    )
    found, p = run(layer, x)
    y, _ = found.value
    mine = {name.removeprefix("router/"): a for name, a in p.items() if name.startswith("router/")}
    for b, s in np.ndindex(2, 5):
        t = x[b, s]
        expected = (silu(t @ p["shared/gate"]) * (t @ p["shared/up"])) @ p["shared/down"]
        if gate:
            expected = expected / (1 + np.exp(-t @ p["shared_gate"]))
        for i, w in zip(*due(mine, t, {"chosen": 2}, np.zeros(4)), strict=True):
            hidden = silu(t @ p["experts/gate"][i]) * (t @ p["experts/up"][i])
            expected = expected + w * (hidden @ p["experts/down"][i])
        np.testing.assert_allclose(y[b, s], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"chosen": 9}, "between 1 and 8"),
        ({"chosen": 0}, "between 1 and 8"),
        ({"chosen": 2, "scores": "tanh"}, "softmax"),
        ({"chosen": 2, "groups": 3, "chosen_groups": 1}, "groups that divide"),
        ({"chosen": 2, "groups": 4, "chosen_groups": 5}, "groups that divide"),
        ({"chosen": 5, "groups": 4, "chosen_groups": 2}, "at most 4 chosen experts"),
    ],
    ids=str,
)
def test_what_a_router_refuses(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Router(embed=6, experts=8, **options)


def test_what_the_operation_refuses() -> None:
    ops = ReferenceOps()
    x, ids, w = np.zeros((2, 3, 4)), np.zeros((2, 3, 1), np.int32), np.ones((2, 3, 1))
    p = np.zeros((5, 4, 4))

    def matmul(ops: Any, x: Any, p: Any) -> Any:
        return ops.grouped_matmul(x, p)

    def noting(ops: Any, x: Any, p: Any) -> Any:
        ops.aux("a", np.zeros(1))
        return x

    for call, word in (
        (lambda: ops.experts(matmul, x[0], ids, w, p), "experts and weights"),
        (lambda: ops.experts(matmul, x, ids, w[:1], p), "experts and weights"),
        (lambda: ops.experts(matmul, x, ids, w), "params"),
        (lambda: ops.experts(matmul, x, ids, w, p, p[:2]), "same number X"),
        (lambda: ops.experts(matmul, x, ids + 5, w, p), "from 0 to 4"),
        (lambda: ops.experts(matmul, x, ids, w, p[:, :3]), r"params \(X, E, F\)"),
        (lambda: ops.experts(lambda ops, x, p: x[:2], x, ids, w, p), "a row for every row"),
        (lambda: ops.experts(noting, x, ids, w, p), "records nothing"),
        (lambda: ops.grouped_matmul(x[0], p), "in the body of ops.experts"),
        (lambda: ops.grouped_bias(x[0], p[:, 0]), "in the body of ops.experts"),
    ):
        with pytest.raises(UserError, match=word):
            call()
