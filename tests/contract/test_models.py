"""Whole models on every backend beside the oracle: losses, logits, side outputs, gradients, States, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.backends.reference import directional_derivative
from portatrain.model.lora import LoRA, adapt
from portatrain.model.module import Module
from portatrain.optim import SGD
from portatrain.testing.tolerance import amplification, moved, tolerance
from recipes.models.decoder import DecoderConfig
from recipes.models.dit import DiTConfig
from recipes.models.siglip import ImageTower, SigLIPConfig, TextTower
from recipes.models.vit import ViTConfig
from tests.support.running import BACKENDS, Running, image_batch, microbatches, tokens_batch
from tests.support.toy_models import Latent, Mixture, Nested, Routed

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def decoder(**options: Any) -> Callable[[], Module]:
    given = {"vocab": 23, "embed": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 24, **options}
    return lambda: DecoderConfig(**given).build()


def vit() -> Module:
    sizes = {"rows": 8, "columns": 8, "channels": 1, "patch": 2, "classes": 5, "embed": 16, "layers": 2, "heads": 2}
    return ViTConfig(**sizes, dropout=0.2).build()


def dit() -> Module:
    """Noise, times and hidden classes are drawn; the modulations are not 0, as `parameters` makes them."""
    sizes = {"rows": 8, "columns": 8, "channels": 1, "patch": 4, "classes": 5, "embed": 16, "layers": 2, "heads": 2}
    return DiTConfig(**sizes, frequencies=3, unlabelled=0.3).build()


def towers() -> Module:
    sizes: dict[str, Any] = {"embed": 16, "layers": 1, "heads": 2, "mlp": 24}
    image = ImageTower(**sizes, size=8, channels=1, patch=4)
    return SigLIPConfig(image=image, text=TextTower(**{**sizes, "embed": 12}, vocab=23, positions=6)).build()


def routed() -> Module:
    return Routed(vocab=23, embed=12, layers=2, experts=4, chosen=2, rate=0.01)


def mixture() -> Module:
    return Mixture(vocab=23, embed=8, layers=2, experts=4, chosen=2, clamped=False)


def nested() -> Module:
    return Nested(vocab=23, embed=8, layers=2, inner=3, rate=0.3)


def latent(**options: Any) -> Callable[[], Module]:
    sizes = {"heads": 3, "nope_dim": 4, "rope_dim": 6, "value_dim": 5, "kv_rank": 7, "mlp": 24, **options}
    return lambda: Latent(vocab=23, embed=16, layers=2, **sizes)


MODELS: dict[str, Callable[[], Module]] = {
    "decoder": decoder(),
    "decoder, untied": decoder(tied=False),
    "decoder, all options": decoder(
        **{"dropout": 0.3, "window": 4, "softcap": 2.0, "logit_softcap": 3.0, "qk_norm": True, "z_loss": 0.01},
        **{"head_dim": 6, "sinks": True, "value_head_dim": 4},
    ),
    "latent": latent(q_rank=9, scale=0.4, window=4),
    "latent, queries from the input": latent(softcap=3.0),
    "vit": vit,
    "dit": dit,
    "towers": towers,
    "routed": routed,
    "mixture": mixture,
    "mixture, adapted": lambda: adapt(mixture(), LoRA(rank=2, targets=("*/experts/*", "*/shared/*"))),
    "latent, adapted": lambda: adapt(latent(q_rank=9)(), LoRA(rank=2, targets=("*/attn/*",))),
    "nested": nested,
}

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def batch_for(make: Callable[[], Module]) -> dict[str, np.ndarray]:
    if make is towers:
        return image_batch(classes=5, batch=4) | {"tokens": tokens_batch(vocab=23, batch=4, seq=6)["tokens"]}
    return image_batch(classes=5, batch=4) if make in (vit, dit) else tokens_batch(vocab=23, batch=4, seq=10)


def bounds(running: Running, what: Callable[[Any], np.ndarray], batch: Any, **options: Any) -> tuple[np.ndarray, float]:
    """The oracle's value of something of a forward pass, and the tolerance for it."""
    names = list(running.params)
    given = running.params

    def value(*params: np.ndarray) -> np.ndarray:
        running.params = dict(zip(names, params, strict=True))
        try:
            return np.asarray(what(running.oracle(batch, **options)))
        finally:
            running.params = given

    exact = value(*given.values())
    change = amplification(value, list(given.values()), exact, np.random.default_rng(1))
    return exact, tolerance(float(np.abs(exact).max()), change)


@every_backend
@every_model
def test_evaluation(backend: str, make: Callable[[], Module]) -> None:
    running, batch = Running(backend, make()), batch_for(make)
    found = running.backend.eval(running.state, batch)
    exact, most = bounds(running, lambda f: f.value.loss_B, batch, step=0)
    assert np.abs(found["loss_B"] - exact).max() <= most
    forward = running.oracle(batch, step=0)
    assert np.array_equal(found["weight_B"], forward.value.weight_B)
    assert set(found) == {"loss_B", "weight_B", *forward.auxes}
    for name, aux in forward.auxes.items():
        exact, most = bounds(running, lambda f, name=name: f.auxes[name].value_B, batch, step=0)
        share = aux.count if aux.reduce == "mean" else 1
        assert np.abs(found[name] - exact / share).max() <= most, name


@every_backend
@pytest.mark.parametrize("make", [MODELS["decoder, all options"], vit], ids=["decoder", "vit"])
def test_prediction(backend: str, make: Callable[[], Module]) -> None:
    running, batch = Running(backend, make()), batch_for(make)
    exact, most = bounds(running, lambda f: f.value, batch, method="predict")
    found = running.backend.predict(running.state, batch)
    assert found.dtype == np.float32 and found.shape == exact.shape
    assert np.abs(found - exact).max() <= most


@every_backend
@every_model
def test_gradients(backend: str, make: Callable[[], Module]) -> None:
    """The loss, and every parameter's gradient along a random direction, with dropout and auxiliary losses, in two
    microbatches (one decoder also in one)."""
    running, batch = Running(backend, make()), batch_for(make)
    names, given = list(running.params), running.params
    weight = float(running.oracle(batch).value.weight_B.sum())
    rng = np.random.default_rng(2)

    def objective(*params: np.ndarray) -> float:
        running.params = dict(zip(names, params, strict=True))
        try:
            return float(running.oracle(batch, training=True, step=7).objective) / weight
        finally:
            running.params = given

    values = list(given.values())
    counts = (1, 2) if make is MODELS["decoder"] else (2,)
    found = {n: running.backend.gradients(running.state, microbatches(batch, n), step=7) for n in counts}
    exact = np.asarray(objective(*values))
    change = amplification(lambda *p: np.asarray(objective(*p)), values, exact, rng)
    for loss, gradients in found.values():
        assert set(gradients) == set(names)
        assert abs(loss - exact) <= tolerance(abs(float(exact)), change)
    largest = max(float(np.linalg.norm(g)) for g in found[2][1].values())
    for i, name in enumerate(names):
        direction = rng.normal(size=given[name].shape)
        along = [direction if j == i else None for j in range(len(names))]
        true = directional_derivative(objective, values, along)
        near = directional_derivative(objective, [moved(v, rng) for v in values], along)
        most = tolerance(largest, abs(true - near) / 1e-6)
        for n, (_, gradients) in found.items():
            assert gradients[name].shape == given[name].shape
            error = abs(float((gradients[name] * direction).sum()) - true)
            assert error <= most, f"{name} in {n} microbatches: {error:.3g} > {most:.3g}"


@every_backend
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [routed, nested], ids=["routed", "nested"])
def test_states_after_a_step(backend: str, make: Callable[[], Module], accumulation: int) -> None:
    """What was tallied over all microbatches, and what after_step made of it, over three steps."""
    from portatrain.backends import reference

    running = Running(backend, make())
    for step in (1, 2, 3):
        batch = tokens_batch(vocab=23, batch=4, seq=10, seed=step)
        running.state, result = running.backend.step(
            running.state, microbatches(batch, accumulation), step=step, scale=1.0
        )
        assert int(result.skipped) == 0
        for i in range(accumulation):
            half = {k: v.reshape(accumulation, -1, *v.shape[1:])[i] for k, v in batch.items()}
            running.states = running.oracle(half, training=True, step=step).states
        running.states = reference.after_step(running.definition, running.states)
        found = running.tensors("state")
        assert set(found) == set(running.states)
        for name, exact in running.states.items():
            # Counts are exact; a bias is a sum of three rounded rates.
            most = 0.0 if exact.dtype.kind != "f" else 4 * 2.0**-24 * float(np.abs(exact).max())
            assert np.abs(found[name].astype(float) - exact).max() <= most, name


@every_backend
@pytest.mark.parametrize("name", ["decoder, all options", "vit", "routed", "nested"])
def test_bf16_stays_close(backend: str, name: str) -> None:
    """Every model runs in bf16, forward and backward; loss and gradient (as one vector) are near those in fp32: within
    32 roundings, for the few dozen operations from input to loss."""
    make = MODELS[name]
    batch = batch_for(make)
    wide, narrow = (Running(backend, make(), precision=p) for p in ("fp32", "bf16"))
    (loss, gradients), (rough_loss, rough) = (
        r.backend.gradients(r.state, microbatches(batch), step=1) for r in (wide, narrow)
    )
    assert abs(rough_loss - loss) <= 32 * 2.0**-9 * abs(loss)
    assert rough_loss != loss
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    error = np.sqrt(sum(float(((rough[n] - g) ** 2).sum()) for n, g in gradients.items()))
    assert error <= 32 * 2.0**-9 * norm


@every_backend
def test_remat_changes_nothing(backend: str) -> None:
    """Recomputing blocks gives the loss, the update (the gradient itself), side outputs and tallies of keeping them."""
    batch = microbatches(tokens_batch(vocab=23, batch=4, seq=10), 2)
    losses, auxes, params = [], [], []
    for remat in ("none", "block"):
        running = Running(backend, nested(), remat=remat, optimizer=SGD(lr=1.0, momentum=0.0))
        running.state, result = running.backend.step(running.state, batch, step=3, scale=1.0)
        losses.append(float(result.loss))
        auxes.append({name: float(value) for name, value in result.aux.items()})
        params.append(running.tensors("params"))
        assert running.tensors("state")["blocks/inner/calls"].tolist() == [[2, 2, 2], [2, 2, 2]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert auxes[0] == pytest.approx(auxes[1], rel=1e-6)
    for name, kept in params[0].items():
        assert np.abs(kept - running.params[name]).max() > 1e-4  # it moved
        np.testing.assert_allclose(params[1][name], kept, rtol=0, atol=2e-6 * np.abs(kept).max(), err_msg=name)
