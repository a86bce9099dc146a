"""Remat policies: the gradients of `none` under each of them, and memory that falls by what they promise."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import numpy as np
import pytest

from portatrain.backends.program import Program
from portatrain.errors import UserError
from portatrain.model import remat
from portatrain.model.across_samples import Across
from portatrain.model.layout import Layout
from portatrain.model.module import Module, Param, Stack, describe
from portatrain.model.ops import Array, Batch, Loss, Ops
from portatrain.optim import SGD
from portatrain.plan.cost.policy import REMATS
from recipes.models.decoder import DecoderConfig
from recipes.models.vit import ViTConfig
from tests.support.running import BACKENDS, Running, image_batch, microbatches, tokens_batch
from tests.support.toy_models import Nested

every_backend = pytest.mark.parametrize("backend", BACKENDS)

FEW = ("dots", "keep:attention+hidden")
ALL = ("block", "attention", "dots", "keep:attention+hidden", "keep:qkv+product", "keep:normed+projected")

LAYERS, ROWS, SEQ, E, H, KV, D, M = 5, 2, 48, 32, 4, 2, 8, 80
DECODER = DecoderConfig(vocab=64, embed=E, layers=LAYERS, heads=H, kv_heads=KV, mlp=M, dropout=0.1)
MODELS = {
    "decoder": DECODER,
    "softcap": DecoderConfig(vocab=64, embed=E, layers=3, heads=H, kv_heads=1, mlp=M, softcap=5.0, qk_norm=True),
    "vit": ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=5, embed=E, layers=3, heads=4, mlp=M, dropout=0.2),
}


def batch_of(model: str) -> dict[str, np.ndarray]:
    batch = image_batch(classes=5, batch=4) if model == "vit" else tokens_batch(vocab=64, batch=4, seq=SEQ)
    return microbatches(batch, 2)


@pytest.mark.usefixtures("compiled_quickly")
@every_backend
@pytest.mark.parametrize(
    ("model", "policies"), [("decoder", FEW), *(pytest.param(model, ALL, marks=pytest.mark.full) for model in MODELS)]
)
def test_gradients_are_those_of_none(backend: str, model: str, policies: tuple[str, ...]) -> None:
    batch = batch_of(model)
    kept: Any = None
    for policy in ("none", *policies):
        running = Running(backend, MODELS[model].build(), remat=policy)
        loss, gradients = running.backend.gradients(running.state, batch, step=3)
        if policy == "none":
            kept = loss, gradients
            continue
        assert abs(loss - kept[0]) <= 1e-6 * abs(kept[0])
        for name, gradient in gradients.items():
            assert np.abs(gradient - kept[1][name]).max() <= 1e-6 * np.abs(kept[1][name]).max(), (policy, name)


class Own(Module):
    """A block with a name of its own, and one outside of blocks."""

    def __init__(self) -> None:
        self.w = Param(embed=8, mlp=8)

    def __call__(self, ops: Ops, x: Array) -> tuple[Array, None]:
        return ops.silu(ops.name(ops.einsum("be,em->bm", x, self.w), "mine")), None


class Outer(Module):
    def __init__(self) -> None:
        self.blocks = Stack(Own(), 2)
        self.head = Param(vocab=4, embed=8, fan_in_axes=0)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        x, _ = self.blocks(ops, ops.name(batch["x"], "outside"))
        return ops.cross_entropy(x, self.head, batch["y"])


@every_backend
def test_a_models_own_name(backend: str) -> None:
    batch = {"x": np.ones((1, 3, 8), np.float32), "y": np.zeros((1, 3), np.int32), "sample": np.zeros((1, 3), np.int64)}
    fine = Running(backend, Outer(), remat="keep:mine")
    fine.backend.gradients(fine.state, batch, step=1)
    for name in ("minne", "outside"):
        running = Running(backend, Outer(), remat=f"keep:{name}")
        with pytest.raises(UserError, match=rf"blocks: expected one of attention, mine, got '{name}'"):
            running.backend.gradients(running.state, batch, step=1)


@pytest.mark.full
@pytest.mark.usefixtures("compiled_quickly")
@every_backend
def test_stacks_in_stacks(backend: str) -> None:
    batch = microbatches(tokens_batch(vocab=64, batch=4, seq=8), 2)
    found = []
    for policy in ("none", "dots", "attention"):
        running = Running(backend, Nested(vocab=64, embed=16, layers=2, inner=2, rate=0.1), remat=policy)
        found.append(running.backend.gradients(running.state, batch, step=1)[1])
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert np.abs(gradient - other[name]).max() <= 1e-6 * np.abs(gradient).max(), name


def test_one_list_of_names() -> None:
    assert set(REMATS) == set(remat.POLICIES)
    for name, policy in remat.POLICIES.items():
        shares = {a: getattr(REMATS[name], a) for a in remat.ACTIVATIONS}
        assert shares == {a: float(a in policy.names) for a in remat.ACTIVATIONS}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blok", r"one of attention, block, dots.*got 'blok'. Did you mean block"),
        ("atention", "Did you mean attention"),
        ("kep:qkv", "keep:NAME"),
        ("keep:", r"names of activations.*got ''"),
        ("keep:qkv,hidden", r"joined by '\+'"),
        ("offload:qkv+qkv", "each once"),
    ],
)
def test_what_is_no_policy(text: str, said: str) -> None:
    definition = describe(DECODER.build())
    with pytest.raises(UserError, match=said):
        Program(
            definition=definition,
            layout=Layout.of(definition),
            optimizer=SGD(lr=1.0),
            trainable=frozenset(definition.params),
            decay=frozenset(),
            remat=text,
        )


@functools.cache
def compiled_gradients(policy: str) -> dict[str, np.ndarray]:
    running = Running("torch", DECODER.build(), remat=policy, compile=True)
    return running.backend.gradients(running.state, batch_of("decoder"), step=1)[1]


# torch's compiler imports what torch calls deprecated, and looks at the .grad of every tensor it is given.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.hand
@pytest.mark.timeout(900)
@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
@pytest.mark.parametrize("policy", ["block", "dots", "attention", "keep:hidden"])
def test_compiled_blocks(policy: str) -> None:
    """Compiled whole, with no break of the graph; the same gradients as compiled without a policy."""
    found = compiled_gradients(policy)
    for name, gradient in compiled_gradients("none").items():
        assert np.abs(gradient - found[name]).max() <= 1e-6 * np.abs(gradient).max(), name


# ---- memory


@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_jax_keeps_less() -> None:
    """Bytes that the forward pass hands to the backward pass, by tracing alone."""
    import jax

    def kept_bytes(policy: str) -> int:
        running = Running("jax", DECODER.build(), remat=policy)
        backend: Any = running.backend
        batch = {k: v[0] for k, v in backend._put(batch_of("decoder"), 1).items()}

        def backward(params: Any) -> Any:
            _, pull, _ = jax.vjp(
                lambda p: backend._loss(
                    p, {}, running.state["state"], batch, np.int32(1), Across(), backend.layout, False
                ),
                params,
                has_aux=True,
            )
            return pull

        leaves = jax.tree.leaves(jax.eval_shape(backward, running.state["params"]))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    found = {p: kept_bytes(p) for p in (*remat.POLICIES, "keep:hidden", "keep:qkv+product")}
    token = LAYERS * ROWS * SEQ * 4
    assert found["keep:hidden"] - found["block"] == token * 2 * M
    assert found["keep:qkv+product"] - found["block"] == token * ((H + 2 * KV) * D + M)
    assert found["attention"] - found["block"] == token * H * D
    # Of the last projection nothing is kept: what a policy may keep and no later operation asks for is dropped.
    assert found["dots"] - found["block"] == token * ((H + 2 * KV) * D + E + 2 * M)
    assert found["none"] - found["dots"] > token * 2 * E


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_a_compiled_step_needs_less_a_layer() -> None:
    """The compiler's own count of temporary bytes: what a layer more adds."""

    def temporary_bytes(policy: str, layers: int) -> int:
        running = Running("jax", dataclasses.replace(DECODER, layers=layers).build(), remat=policy)
        backend: Any = running.backend
        given = running.state, backend._put(batch_of("decoder"), 1), np.int32(1)
        return backend._gradients_of.lower(*given).compile().memory_analysis().temp_size_in_bytes

    a_layer = {p: (temporary_bytes(p, 24) - temporary_bytes(p, 8)) / 16 for p in remat.POLICIES}
    print(a_layer)
    token = ROWS * SEQ * 4
    assert a_layer["none"] > a_layer["dots"] > a_layer["attention"] > a_layer["block"]
    kept = token * ((H + 2 * KV) * D + E + 2 * M)
    assert a_layer["dots"] - a_layer["block"] == pytest.approx(kept, rel=0.02)


@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_jax_offloads() -> None:
    """What is offloaded lies in the host's memory space while the backward pass waits for it."""
    batch = batch_of("decoder")
    found = []
    for policy in ("none", "offload:hidden+attention"):
        running = Running("jax", DECODER.build(), remat=policy)
        backend: Any = running.backend
        given = running.state, backend._put(batch, 1), np.int32(1)
        # As a TPU would be told: on a CPU both spaces are one, and jax leaves the move out.
        text = backend._gradients_of.trace(*given).lower(lowering_platforms=("tpu",)).as_text()
        assert ("pinned_host" in text) == (policy != "none")
        found.append(backend.gradients(running.state, batch, step=1)[1])
    for name, gradient in found[0].items():
        assert np.abs(gradient - found[1][name]).max() <= 1e-6 * np.abs(gradient).max(), name


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_torch_needs_less() -> None:
    """Bytes that live on when the forward pass has ended, to the last one."""

    def kept_bytes(policy: str) -> int:
        running = Running("torch", DECODER.build(), remat=policy)
        backend: Any = running.backend
        batch = {k: v[0] for k, v in batch_of("decoder").items()}
        from benchmarks.live_bytes import Live

        with Live() as live:
            loss, _ = backend._forward(running.state, backend._put(batch), 1, True)
            gc.collect()
            found = live.bytes
        loss.sum.backward()
        return found

    found = {p: kept_bytes(p) for p in (*remat.POLICIES, "keep:hidden", "keep:qkv+product")}
    token = LAYERS * ROWS * SEQ * 4
    assert found["keep:hidden"] - found["block"] == token * 2 * M
    assert found["keep:qkv+product"] - found["block"] == token * ((H + 2 * KV) * D + M)
    # Its kernel gives the log of the sum of exponentials too.
    assert found["attention"] - found["block"] == token * (H * D + H)
    # With the last projection, which no later operation asks for but which is a matmul like the others.
    assert found["dots"] - found["block"] == token * ((H + 2 * KV) * D + 2 * E + 2 * M)
    assert found["none"] - found["dots"] > token * 2 * E


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_torch_does_not_offload() -> None:
    with pytest.raises(UserError, match=r"offload:hidden.*Use keep:hidden, or --backend jax"):
        Running("torch", DECODER.build(), remat="offload:hidden")
