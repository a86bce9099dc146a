"""State, side outputs and per-layer inputs suffice for a key-value cache and for a bias-balanced router."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends import reference
from recipes.models.decoder import DecoderConfig
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch
from tests.support.toy_models import CachedDecoder, Routed

CONFIG = DecoderConfig(vocab=23, embed=16, layers=3, heads=4, kv_heads=2, mlp=24, rope_theta=100.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", [1, 4, 9])
def test_decoding_with_a_cache_equals_the_full_forward(backend: str, prompt: int) -> None:
    cached, plain = Running(backend, CachedDecoder(CONFIG, prompt=prompt)), Running(backend, CONFIG.build())
    batch = tokens_batch(vocab=23, batch=2, seq=9)
    ones, positions = np.ones_like(batch["tokens"]), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    batch |= {"segment_ids": ones, "positions": positions}
    # A cache longer than the text, with rubbish where nothing has been written: no query may see it.
    empty = np.full((2, 3, 12, 2, 4), 7.0, np.float32)
    whole = plain.backend.predict(plain.state, batch)
    exact = reference.forward(plain.definition, plain.params, batch, method="predict").value
    stepwise = cached.backend.predict(cached.state, {**batch, "k_cache": empty, "v_cache": empty})
    scale = np.abs(exact).max()
    assert np.abs(whole - exact).max() <= 2e-6 * scale
    assert np.abs(stepwise - exact).max() <= 2e-6 * scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_balances_the_router(backend: str) -> None:
    """All tokens prefer one expert at first; the biases alone even the load out while no parameter moves."""
    running = Running(backend, Routed(vocab=64, embed=16, layers=2, experts=4, chosen=1, rate=0.02))
    running.params["embed/table"] += 1.0  # a direction that all tokens share, and one expert a layer that wants it
    running.params["blocks/experts/gate"][0, :, 0] += 0.1
    running.params["blocks/experts/gate"][1, :, 3] += 0.1
    running.state = running.backend.restore_state(running.read)
    uneven = []
    for step in range(1, 61):
        batch = tokens_batch(vocab=64, batch=8, seq=32, seed=step)
        running.state, _ = running.backend.step(running.state, microbatches(batch, 2), step=step, scale=1.0)
        load = running.tensors("state")["blocks/experts/last_load"]
        assert (load.sum(1) == 8 * 32).all()
        uneven.append(load.max(1) / load.mean(1))
    before, after = np.mean(uneven[:3], axis=0), np.mean(uneven[-10:], axis=0)
    assert (before > 2).all() and (after < 1.4).all(), (before, after)
    bias = running.tensors("state")["blocks/experts/bias"]
    assert not np.allclose(bias[0], bias[1])  # each layer balances itself


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norms_of_a_probe_are_of_whole_numbers_too(backend: str) -> None:
    running = Running(backend, Routed(vocab=64, embed=16, layers=2, experts=4, chosen=1, rate=0.02))
    batch = microbatches(tokens_batch(vocab=64, batch=8, seq=32), 2)
    running.state, _ = running.backend.step(running.state, batch, step=1, scale=1.0)
    norms = running.backend.probe(running.state, batch, step=2, scale=1.0)
    for name, held in running.tensors("state").items():
        per_layer = np.sqrt(np.square(held.astype(np.float64)).reshape(2, -1).sum(1))
        np.testing.assert_allclose(norms[f"state/{name}"], per_layer, rtol=1e-6)
