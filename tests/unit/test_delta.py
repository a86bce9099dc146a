"""Gated delta nets against the recurrence, position by position, in float64; documents, chunks, borders, and what the
planner counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.backends.reference.ops import ReferenceOps
from portatrain.backends.state import initial_box
from portatrain.errors import UserError
from portatrain.model.layers import GatedDeltaNet, documents_of
from portatrain.model.layers._delta import gated_delta_rule
from portatrain.model.layout import Layout, Mesh
from portatrain.model.module import Param, Values, describe
from portatrain.plan.clusters.names import parse
from portatrain.plan.cost.recipes import shape_of
from portatrain.plan.cost.shapes import Recurrence
from portatrain.plan.search import plan
from portatrain.recipe import Recipe, load_recipe
from recipes.models.olmo_hybrid import OlmoHybridConfig
from tests.support.running import tokens_batch

Array = np.ndarray
SMALL = OlmoHybridConfig(
    **{"vocab": 14, "embed": 8, "layers": 2, "heads": 2, "mlp": 8, "chunk": 3},
    **{"key_heads": 1, "value_heads": 2, "key_size": 3, "value_size": 5},
)
UNIT = 2.0**-53


def drawn(length: int, seed: int = 0, *, alike: bool = False) -> dict[str, Array]:
    """Arguments of the rule, with keys of length 1 and any strength; alike: keys that hardly differ, and no decay."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, length, 3, 4))
    k = 1.0 + 0.01 * k if alike else k
    return {
        "q_BSHK": q,
        "k_BSHK": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v_BSHV": rng.normal(size=(2, length, 3, 5)),
        "log_decay_BSH": 0.0 * q[..., 0] if alike else -(rng.exponential(size=(2, length, 3)) ** 3),
        "strength_BSH": 2 * rng.uniform(size=(2, length, 3)),
    }


def recurrence(given: dict[str, Array], segments: Array | None) -> Array:
    """Equation 10 of Yang, Kautz and Hatamizadeh 2025, one position after another."""
    q, k, v, g, b = given.values()
    out = np.zeros(v.shape)
    for row in range(len(q)):
        state = np.zeros((q.shape[2], q.shape[3], v.shape[3]))
        for s in range(q.shape[1]):
            if segments is not None and s and segments[row, s] != segments[row, s - 1]:
                state = np.zeros_like(state)
            state = state * np.exp(g[row, s])[:, None, None]
            error = b[row, s][:, None] * (v[row, s] - np.einsum("hk,hkv->hv", k[row, s], state))
            state = state + k[row, s][:, :, None] * error[:, None]
            out[row, s] = np.einsum("hk,hkv->hv", q[row, s], state) / np.sqrt(q.shape[3])
    return out


@pytest.mark.parametrize("length", [1, 2, 7, 24, 33])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_compute_the_recurrence(length: int, packed: bool) -> None:
    given, ops = drawn(length), ReferenceOps()
    starts = np.random.default_rng(1).random((2, length)) < 0.25
    segments = np.cumsum(starts, axis=1).astype(np.int32) if packed else None
    due = recurrence(given, segments)
    for chunk in (1, 2, 3, 8, 64):
        found = gated_delta_rule(ops, **given, documents_BS=documents_of(ops, segments), chunk=chunk)
        # A state adds a rounding a position, and a triangular system one for every two positions of its chunk.
        assert np.abs(found - due).max() <= 64 * length * UNIT * np.abs(due).max(), chunk


def test_keys_that_are_alike_lose_nothing() -> None:
    """The powers of their system grow to 1e18, so an inverse made of powers would have no digit left."""
    given = drawn(64, alike=True)
    due = recurrence(given, None)
    found = gated_delta_rule(ReferenceOps(), **given, chunk=64)
    assert np.abs(found - due).max() <= 64 * 64 * UNIT * np.abs(due).max()


def test_a_decay_to_nothing_is_finite() -> None:
    given = drawn(9) | {"log_decay_BSH": np.full((2, 9, 3), -1e4)}
    found = gated_delta_rule(ReferenceOps(), **given, chunk=4)
    assert np.abs(found - recurrence(given, None)).max() <= 1e-14


def logits(c: OlmoHybridConfig, batch: dict[str, Array]) -> Array:
    definition = describe(c.build())
    params = reference.initial(definition, seed=3)
    rng = np.random.default_rng(4)
    params = {name: a + 0.3 * rng.normal(size=a.shape) for name, a in params.items()}
    value: Array = reference.forward(definition, params, batch, method="predict").value
    return value


@pytest.mark.parametrize("rotary", [False, True])
def test_a_packed_document_is_the_document_alone(rotary: bool) -> None:
    c = replace(SMALL, rotary=rotary)
    packed = tokens_batch(vocab=c.vocab, batch=2, seq=24, seed=5)
    whole = logits(c, packed)
    seen = 0
    for row in range(2):
        segments = packed["segment_ids"][row]
        for segment in np.unique(segments[segments > 0]):
            at = np.flatnonzero(segments == segment)
            alone = logits(c, {"tokens": packed["tokens"][row : row + 1, at], "sample": packed["sample"][:1]})
            assert np.abs(whole[row, at] - alone[0]).max() <= 1e-12 * np.abs(whole).max()
            seen += len(at) > 3
    assert seen > 2  # documents longer than the convolution


def test_the_size_of_a_chunk_changes_rounding_alone() -> None:
    batch = tokens_batch(vocab=SMALL.vocab, batch=2, seq=24, seed=6)
    found = [logits(replace(SMALL, chunk=chunk), batch) for chunk in (1, 3, 16, 64)]
    assert max(np.abs(each - found[0]).max() for each in found[1:]) <= 1e-12 * np.abs(found[0]).max()


def test_the_size_of_the_convolution_may_exceed_the_text() -> None:
    batch = tokens_batch(vocab=SMALL.vocab, batch=1, seq=2, seed=6)
    assert np.isfinite(logits(replace(SMALL, taps=5), batch)).all()


# ---- borders: meshes, sizes, initial values


def recipe(**sizes: Any) -> Recipe:
    return replace(load_recipe("tiny-lm"), name="hybrid", model=replace(SMALL, vocab=256, **sizes), hooks=())


def test_context_is_refused_where_a_program_is_made_and_where_one_is_planned() -> None:
    definition = describe(SMALL.build())
    for mesh in ("context=2", "fsdp=2,context=2,tensor=2"):
        with pytest.raises(UserError, match=r"(?s)context=2.*context=1.*GatedDeltaNet.*recurrent.*fsdp or tensor"):
            Layout.of(definition, Mesh.parse(mesh))
    Layout.of(describe(replace(SMALL, key_heads=2).build()), Mesh.parse("fsdp=2,tensor=2"))
    shape = shape_of(recipe(embed=8, heads=4, key_heads=4, value_heads=8))
    cluster = parse("h100-8")
    with pytest.raises(UserError, match=r"(?s)context=2.*recurrent"):
        plan(shape, cluster, mesh=(1, 4, 1, 2, 1))
    chosen = plan(shape, cluster)
    assert chosen.best and all(one.mesh[3] == 1 for one in chosen.best)
    assert any("recurrent" in one.reason for one in chosen.refused)


def test_heads_that_tensor_does_not_divide_are_named() -> None:
    with pytest.raises(UserError, match=r"key_heads.*tensor=2"):
        Layout.of(describe(SMALL.build()), Mesh.parse("tensor=2"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("key_heads", 0), ("taps", 0), ("chunk", 0), ("value_size", 0), ("recurrent", (True,)), ("value_heads", 3)],
)
def test_wrong_sizes_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        replace(SMALL, **{"key_heads": 2, field: value}).build()


def test_a_state_begins_with_the_published_spread_of_decays() -> None:
    layer = GatedDeltaNet(embed=4, key_heads=30, value_heads=30, key_size=2, value_size=2)
    rates, steps = (np.array(each.init.values) for each in (layer.decay_log, layer.decay_bias))
    assert np.exp(rates).min() > 0 and np.exp(rates).max() < 16
    assert np.allclose(np.exp(rates).mean(), 8, rtol=0.01)
    made = np.log1p(np.exp(steps))
    assert made.min() > 1e-3 and made.max() < 0.1
    assert np.allclose(np.log(made).mean(), np.log(1e-2), atol=0.02)
    assert abs(np.corrcoef(rates, steps)[0, 1]) < 0.5


def test_given_values_fill_every_layer_and_every_box() -> None:
    info = describe(SMALL.build()).params["blocks/runs/0/delta/decay_log"]
    assert isinstance(info.init, Values)
    whole = initial_box(info, 0, (0,) * len(info.shape), info.shape)
    assert whole.dtype == np.float32 and (whole == np.float32(info.init.values)).all()
    part = initial_box(info, 0, (0, 1), (1, 1))
    assert part.item() == np.float32(info.init.values[1])
    with pytest.raises(UserError, match="2 initial values"):
        Param(heads=2, fan_in_axes=0, init=Values(values=(1.0,)))


# ---- what is counted


class Counting(ReferenceOps):
    """The oracle, which counts the FLOPs of its products: those of float32 operands, and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = self.others = 0.0

    def einsum(self, spec: str, *operands: Array, dtype: str | None = None) -> Array:
        inputs = spec.partition("->")[0].split(",")
        sizes = {k: n for term, x in zip(inputs, operands, strict=True) for k, n in zip(term, x.shape, strict=True)}
        flops = 2.0 * math.prod(sizes.values())
        if dtype == "exact":
            self.exact += flops
        else:
            self.others += flops
        return super().einsum(spec, *operands, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 4, 6, 8])
def test_the_planner_counts_the_products_of_a_chunk(chunk: int) -> None:
    ops, given = Counting(), drawn(24)
    gated_delta_rule(ops, **given, chunk=chunk)
    sizes = Recurrence(layers=1, key_heads=3, value_heads=3, key_size=4, value_size=5, chunk=chunk)
    assert ops.others == 2 * 24 * sizes.flops
    assert ops.exact == 2 * 24 * sizes.exact_flops[0]


def test_the_planner_knows_both_kinds_of_layers() -> None:
    c = replace(SMALL, layers=5, recurrent=(True, True, False, True, False))
    definition = describe(replace(c, vocab=256).build())
    shape = shape_of(recipe(layers=5, recurrent=c.recurrent))
    assert shape.layers == 2 and shape.recurrence is not None and shape.recurrence.layers == 3
    assert (shape.heads, shape.head_dim) == (2, 4) and shape.recurrence.value_size == 5
    assert shape.parameters == definition.parameters
    weights = sum(i.size for i in definition.params.values() if i.fan_in_axes) + 256 * c.embed
    states, pairs = 3 * 2 * 3 * 5, 2 * 12 * 2 * 4 * 256**2 / 2
    assert replace(c, vocab=256).flops_per_sample(256) == 256 * (6 * weights + 18 * states) + pairs
