"""The portable layers on the oracle, beside plain NumPy; and what their constructors refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import Context
from portatrain.backends.reference import ReferenceOps, forward, initial
from portatrain.errors import UserError
from portatrain.model.layers import (
    MLP,
    Attention,
    Dropout,
    Embedding,
    GatedMLP,
    LayerNorm,
    Linear,
    PatchEmbedding,
    RMSNorm,
)
from portatrain.model.module import Definition, Module, Param, Stack, describe
from recipes.models.decoder import DecoderConfig
from recipes.models.deepseek_v3 import DeepseekV3Config
from recipes.models.qwen3 import Qwen3Config
from recipes.models.vit import ViTConfig

RNG = np.random.default_rng(0)


class Calling(Module):
    """Calls a layer on the arrays of a batch, in their order."""

    def __init__(self, layer: Module) -> None:
        self.layer = layer
        self.unused = Param(embed=1)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return self.layer(ops, *batch.values())


def run(layer: Module, *args: np.ndarray, context: Context | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(result, parameters by the layer's own names), with random parameters, biases and scales included."""
    definition = describe(Calling(layer))
    params = {n: a + 0.3 * RNG.normal(size=a.shape) for n, a in initial(definition).items()}
    result = forward(definition, params, {str(i): a for i, a in enumerate(args)}, context).value
    return result, {name.removeprefix("layer/"): array for name, array in params.items()}


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


def shapes(layer: Module) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in described(layer).params.items()}


def described(layer: Module) -> Definition:
    return describe(layer)


# ---- values


def test_linear() -> None:
    x = normal(2, 5, 6)
    y, p = run(Linear({"embed": 6}, {"mlp": 4}), x)
    np.testing.assert_allclose(y, x @ p["weight"] + p["bias"], rtol=1e-12)


def test_linear_over_several_axes() -> None:
    x = normal(2, 5, 3, 4)
    y, p = run(Linear({"heads": 3, "head_dim": 4}, {"embed": 6, "pair": 2}, bias=False), x)
    assert set(p) == {"weight", "unused"}
    np.testing.assert_allclose(y, np.tensordot(x, p["weight"], 2), rtol=1e-12)


def test_linear_on_vectors() -> None:
    x = normal(7, 6)
    y, p = run(Linear({"embed": 6}, {"classes": 3}), x)
    np.testing.assert_allclose(y, x @ p["weight"] + p["bias"], rtol=1e-12)


def test_norms() -> None:
    x = normal(2, 3, 6)
    y, p = run(RMSNorm(embed=6, eps=0.1), x)
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * p["scale"], rtol=1e-12)
    y, p = run(LayerNorm(embed=6, eps=0.1), x)
    plain = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(y, plain * p["scale"] + p["bias"], rtol=1e-12)
    y, p = run(LayerNorm(head_dim=6, eps=0.1, bias=False), x)
    np.testing.assert_allclose(y, plain * p["scale"], rtol=1e-12)


def test_embedding() -> None:
    ids = np.array([[0, 4, 4], [2, 0, 1]])
    y, p = run(Embedding(vocab=5, embed=3), ids)
    np.testing.assert_array_equal(y, p["table"][ids])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_gated_mlp() -> None:
    x = normal(2, 3, 4)
    y, p = run(GatedMLP(embed=4, mlp=7), x)
    np.testing.assert_allclose(y, (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"], rtol=1e-12)


@pytest.mark.parametrize(("activation", "function"), [("relu", lambda x: np.maximum(x, 0)), ("silu", silu)])
def test_mlp(activation: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    x = normal(2, 3, 4)
    y, p = run(MLP(embed=4, mlp=7, activation=activation), x)
    expected = function(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    y, p = run(MLP(embed=4, mlp=7, activation=activation, bias=False), x)
    np.testing.assert_allclose(y, function(x @ p["up"]) @ p["down"], rtol=1e-12)


def test_gelu_is_the_exact_one_unless_asked() -> None:
    from math import erf

    x = np.linspace(-4, 4, 9)
    exact = np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in x])
    np.testing.assert_allclose(ReferenceOps().gelu(x), exact, atol=1e-15)
    assert 1e-5 < np.abs(ReferenceOps().gelu(x, approximate=True) - exact).max() < 1e-3


def test_patches_are_cut_row_by_row() -> None:
    image = normal(2, 4, 6, 3)
    y, p = run(PatchEmbedding(rows=4, columns=6, channels=3, patch=2, embed=5), image)
    patches = [image[:, r : r + 2, c : c + 2].reshape(2, -1) for r in (0, 2) for c in (0, 2, 4)]
    expected = np.stack(patches, 1) @ p["kernel"].reshape(-1, 5) + p["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_dropout_draws_by_its_path() -> None:
    x = np.ones((3, 500))
    context = Context(training=True, sample=np.arange(3), seed=1)
    first, _ = run(Dropout(0.5), x, context=context)
    assert set(np.unique(first)) == {0.0, 2.0}
    again, _ = run(Dropout(0.5), x, context=context)
    np.testing.assert_array_equal(again, first)
    elsewhere, _ = run(DropoutElsewhere(), x, context=context)
    assert 0.4 < (elsewhere == first).mean() < 0.6
    off, _ = run(Dropout(0.5), x, context=Context(sample=np.arange(3)))
    np.testing.assert_array_equal(off, x)


class DropoutElsewhere(Module):
    def __init__(self) -> None:
        self.inside = Dropout(0.5)

    def __call__(self, ops: Any, x: Any) -> Any:
        return self.inside(ops, x)


def test_dropout_differs_by_layer() -> None:
    class Block(Module):
        def __init__(self) -> None:
            self.dropout = Dropout(0.5)
            self.w = Param(embed=1)

        def __call__(self, ops: Any, x: Any) -> Any:
            return x, self.dropout(ops, x)

    class Model(Module):
        def __init__(self) -> None:
            self.blocks = Stack(Block(), 3)

        def __call__(self, ops: Any, batch: Any) -> Any:
            return self.blocks(ops, batch["x"])[1]

    definition = describe(Model())
    context = Context(training=True, sample=np.arange(2))
    drawn = forward(definition, initial(definition), {"x": np.ones((2, 400))}, context).value
    assert drawn.shape == (3, 2, 400)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert 0.4 < (drawn[a] == drawn[b]).mean() < 0.6


def naive_attention(p: dict[str, np.ndarray], x: np.ndarray, heads: int, kv_heads: int, *, causal: bool) -> np.ndarray:
    """One head and one query at a time."""
    d = p["wq"].shape[-1]
    out = np.zeros_like(x) + p.get("o_bias", 0.0)
    for b, s, h in np.ndindex(x.shape[0], x.shape[1], heads):
        k = h // (heads // kv_heads)
        q = x[b, s] @ p["wq"][:, h] + p.get("q_bias", np.zeros((heads, d)))[h]
        seen = x[b, : s + 1] if causal else x[b]
        keys = seen @ p["wk"][:, k]
        values = seen @ p["wv"][:, k] + p.get("v_bias", np.zeros(kv_heads))[k]
        if "q_norm/scale" in p:
            q = q / np.sqrt((q**2).mean() + 1e-6) * p["q_norm/scale"]
            keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-6) * p["k_norm/scale"]
        weights = np.exp(keys @ q / np.sqrt(d))
        beside = np.exp(p["sink_bias"][h]) if "sink_bias" in p else 0.0
        out[b, s] += (weights / (weights.sum() + beside)) @ values @ p["wo"][h]
    return out


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"causal": False}, {"bias": True}, {"qk_norm": True}, {"bias": True, "qk_norm": True, "causal": False}),
        *({"sinks": True}, {"value_head_dim": 3}, {"sinks": True, "value_head_dim": 10, "bias": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_attention(heads: int, kv_heads: int, options: dict[str, Any]) -> None:
    x = normal(2, 5, 8)
    y, p = run(Attention(embed=8, heads=heads, kv_heads=kv_heads, head_dim=6, **options), x)
    expected = naive_attention(p, x, heads, kv_heads, causal=options.get("causal", True))
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


def test_rotations_make_scores_relative() -> None:
    """With rotated queries and keys the result depends on differences of positions alone."""
    ops, layer = ReferenceOps(), Attention(embed=8, heads=2, kv_heads=2, head_dim=4)
    x = normal(1, 6, 8)
    params = {name: normal(*shape) for name, shape in shapes(layer).items()}
    from portatrain.model.bind import bind

    owners = {id(getattr(layer, name)): array for name, array in params.items()}
    bound = bind(layer, lambda p: owners[id(p)])
    at = np.arange(6)
    near = bound(ops, x, ops.rope_table(at, 4))
    far = bound(ops, x, ops.rope_table(at + 1000, 4))
    scattered = bound(ops, x, ops.rope_table(3 * at, 4))
    np.testing.assert_allclose(far, near, rtol=1e-4, atol=1e-4)  # angles are float32 numbers
    assert np.abs(scattered - near).max() > 1e-2


# ---- declarations


def test_names_and_shapes_of_attention() -> None:
    layer = Attention(embed=8, heads=4, kv_heads=2, head_dim=6, bias=True, qk_norm=True)
    assert shapes(layer) == {
        "wq": (8, 4, 6),
        "wk": (8, 2, 6),
        "wv": (8, 2, 6),
        "wo": (4, 6, 8),
        "q_bias": (4, 6),
        "v_bias": (2, 6),
        "o_bias": (8,),
        "q_norm/scale": (6,),
        "k_norm/scale": (6,),
    }
    assert described(layer).params["wo"].fan_in_axes == 2
    layer = Attention(embed=8, heads=4, kv_heads=2, head_dim=6, sinks=True, value_head_dim=3)
    assert shapes(layer) == {"wq": (8, 4, 6), "wk": (8, 2, 6), "wv": (8, 2, 3), "wo": (4, 3, 8), "sink_bias": (4,)}
    params = described(layer).params
    assert params["sink_bias"].axes == ("heads",) and params["wv"].axes == ("embed", "kv_heads", "value_dim")
    assert params["sink_bias"].init.value == 0 and params["wo"].fan_in_axes == 2


def test_every_bias_is_named_so() -> None:
    """Weight decay leaves alone what is named *bias* or *norm*: every vector of the shipped models but embeddings."""
    vit = ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=32, layers=2, heads=4)
    decoder = DecoderConfig(vocab=8, embed=8, layers=1, heads=2, tied=False, qk_norm=True, sinks=True)
    for config in (vit, decoder):
        for name, info in describe(config.build()).params.items():
            matrix = info.fan_in_axes > 0 or name in ("embed/table", "head", "position")
            assert matrix != ("bias" in name or "norm" in name), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMSNorm(), "RMSNorm: expected one logical axis with its size"),
        (lambda: LayerNorm(embed=3, seq=4), "got embed=3, seq=4"),
        (lambda: Linear({}, {"mlp": 3}), "input axes and output axes"),
        (lambda: Linear({"embed": 3}, {"embed": 3}), "embed_out"),
        (lambda: Dropout(1.0), "a rate in [0, 1)"),
        (lambda: Dropout(-0.1), "a rate in [0, 1)"),
        (
            lambda: PatchEmbedding(rows=8, columns=7, channels=1, patch=2, embed=3),
            "rows and columns that patch=2 divides",
        ),
        (lambda: Attention(embed=8, heads=4, kv_heads=3, head_dim=2), "kv_heads divides"),
        (lambda: Attention(embed=8, heads=4, kv_heads=4, head_dim=3), "an even head_dim"),
        (lambda: Attention(embed=8, heads=4, kv_heads=4, head_dim=2, window=0), "at least 1, or None, got window=0"),
        (lambda: Attention(embed=8, heads=4, kv_heads=4, head_dim=2, softcap=0.0), "above 0, or None, got softcap=0.0"),
        (lambda: DecoderConfig(vocab=8, embed=8, layers=1, heads=0), "model.heads: expected an integer of at least 1"),
        (lambda: DecoderConfig(vocab=8, embed=8, layers=1, heads=2, mlp=0), "model.mlp: expected an integer of at"),
        (lambda: Qwen3Config(vocab=8, embed=8, layers=0, heads=2), "model.layers: expected an integer of at least 1"),
        (lambda: MLP(embed=3, mlp=4, activation="gleu"), "Did you mean gelu"),
        (lambda: GatedMLP(embed=3, mlp=4, activation="swish"), "one of gelu, gelu_tanh, relu, silu"),
    ],
)
def test_wrong_layers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


# ---- the counts that MFU stands on


class Counting(ReferenceOps):
    """Counts 6 FLOPs (2 forward, 4 backward) for every multiply-add of a matmul; of attention, the pairs that are
    seen, where a query sees itself by half."""

    flops = 0.0

    def einsum(self, spec: str, *operands: Any, dtype: str | None = None) -> Any:
        letters = spec.split("->")[0].split(",")
        sizes = {c: n for part, x in zip(letters, operands, strict=True) for c, n in zip(part, x.shape, strict=True)}
        self.flops += 6 * np.prod(list(sizes.values()))
        return super().einsum(spec, *operands, dtype=dtype)

    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        b, s, h, d = q_BSHD.shape
        pairs: float = s * s
        if options.get("causal", True):
            pairs = sum(min(i + 0.5, options.get("window") or s) for i in range(s))
        self.flops += 6 * b * h * (d + v_BTKD.shape[3]) * pairs
        return super().attention(q_BSHD, k_BTKD, v_BTKD, **options)

    def cross_entropy(self, x: Any, table_VE: Any, targets: Any, **options: Any) -> Any:
        self.flops += 6 * x.size * table_VE.shape[0]
        return super().cross_entropy(x, table_VE, targets, **options)


def counted(config: Any, batch: dict[str, np.ndarray]) -> float:
    from portatrain.model.bind import bind

    definition = describe(config.build())
    params = initial(definition)
    ops = Counting(values={key: params[name] for key, name in definition.owners.items()})
    bind(definition.model, ops.value)(ops, batch)
    return ops.flops


@pytest.mark.parametrize("window", [None, 4, 10, 99])
@pytest.mark.parametrize("value_size", [None, 6])
def test_flops_of_the_decoder(window: int | None, value_size: int | None) -> None:
    sizes = {"vocab": 40, "embed": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 24}
    config = DecoderConfig(**sizes, window=window, value_head_dim=value_size, sinks=value_size is not None)
    ids = np.zeros((1, 10), np.int32)
    batch = {"tokens": ids, "targets": ids, "mask": ids, "segment_ids": ids, "positions": np.arange(10)[None]}
    assert config.flops_per_sample(10) == counted(config, batch)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_flops_of_further_tokens(depth: int) -> None:
    sizes = {"vocab": 40, "embed": 16, "layers": 2, "heads": 4, "mlp": 24, "experts": 2, "chosen": 1, "expert_mlp": 8}
    latent = {"q_rank": 8, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 5}
    config = DeepseekV3Config(**sizes, **latent, dense_layers=4, predict_depth=depth)
    ids = np.zeros((1, 10), np.int32)
    batch = {"tokens": ids, "targets": ids, "mask": ids, "segment_ids": ids, "positions": np.arange(10)[None]}
    assert config.flops_per_sample(10) == counted(config, batch)


def test_flops_of_the_vit() -> None:
    config = ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=8, layers=2, heads=2)
    image, label = np.zeros((1, 8, 8, 1)), np.zeros(1, np.int32)
    # The logits that accuracy is read from are not trained through; their 6 x 10 x 8 are left out of the convention.
    assert config.flops_per_sample() == counted(config, {"image": image, "label": label}) - 6 * 10 * 8
