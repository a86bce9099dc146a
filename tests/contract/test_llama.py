"""The decoder is transformers' Llama: same weights, same logits, on the oracle and on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.model.module import describe
from portatrain.model.rope import RopeScaling
from portatrain.testing.tolerance import amplification, tolerance
from recipes.models.decoder import DecoderConfig
from tests.support.running import BACKENDS, Running, parameters, tokens_batch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIGS = {
    "tied": DecoderConfig(vocab=50, embed=32, layers=3, heads=4, kv_heads=4, mlp=48),
    "grouped, untied": DecoderConfig(vocab=50, embed=32, layers=2, heads=4, kv_heads=2, mlp=48, tied=False),
    "one kv head, wide heads, theta": DecoderConfig(
        vocab=40, embed=24, layers=2, heads=3, kv_heads=1, head_dim=16, mlp=40, tied=False, rope_theta=5e5
    ),
    # Eight frequencies, of which some stay, some are mixed and some divided: at 12 positions, 4 to 1 turns are 3 to 12
    # positions long.
    "stretched positions": DecoderConfig(
        vocab=40,
        embed=32,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        mlp=40,
        tied=False,
        rope_theta=50.0,
        rope_scaling=RopeScaling(factor=8.0, low=1.0, high=4.0, original=64),
    ),
}


def rope_parameters(c: DecoderConfig) -> dict[str, Any]:
    """How transformers is told of rotary positions."""
    if c.rope_scaling is None:
        return {"rope_theta": c.rope_theta, "rope_type": "default"}
    s = c.rope_scaling
    return {
        "rope_theta": c.rope_theta,
        "rope_type": "llama3",
        "factor": s.factor,
        "low_freq_factor": s.low,
        "high_freq_factor": s.high,
        "original_max_position_embeddings": s.original,
    }


def llama_logits(c: DecoderConfig, params: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """transformers' logits, in float32, with our parameters."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab,
            hidden_size=c.embed,
            intermediate_size=c.mlp_size,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_size,
            rms_norm_eps=c.norm_eps,
            rope_parameters=rope_parameters(c),
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
        )
    ).eval()
    table, final = params["embed/table"], params["final_norm/scale"]
    state: dict[str, Any] = {"model.embed_tokens.weight": table, "model.norm.weight": final}
    state["lm_head.weight"] = table if c.tied else params["head"]
    for i in range(c.layers):
        p = {name.removeprefix("blocks/"): a[i] for name, a in params.items() if name.startswith("blocks/")}
        layer = {
            "input_layernorm": p["attn_norm/scale"],
            "self_attn.q_proj": p["attn/wq"].reshape(c.embed, -1).T,
            "self_attn.k_proj": p["attn/wk"].reshape(c.embed, -1).T,
            "self_attn.v_proj": p["attn/wv"].reshape(c.embed, -1).T,
            "self_attn.o_proj": p["attn/wo"].reshape(-1, c.embed).T,
            "post_attention_layernorm": p["mlp_norm/scale"],
            "mlp.gate_proj": p["mlp/gate"].T,
            "mlp.up_proj": p["mlp/up"].T,
            "mlp.down_proj": p["mlp/down"].T,
        }
        state |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v), dtype=torch.float32) for k, v in state.items()})
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def plain_batch(c: DecoderConfig) -> dict[str, np.ndarray]:
    """One document a sample, as transformers sees a batch without a mask."""
    batch = tokens_batch(vocab=c.vocab, batch=2, seq=12)
    ones, positions = np.ones_like(batch["tokens"]), np.tile(np.arange(12, dtype=np.int32), (2, 1))
    return {**batch, "segment_ids": ones, "positions": positions}


def allowed(c: DecoderConfig, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """The oracle's logits, and how far a float32 computation of them may lie from it."""
    definition = describe(c.build())
    params = parameters(definition)

    def logits(*values: np.ndarray) -> np.ndarray:
        named = dict(zip(params, values, strict=True))
        return reference.forward(definition, named, batch, method="predict").value

    exact = logits(*params.values())
    change = amplification(logits, list(params.values()), exact, np.random.default_rng(0))
    return exact, tolerance(float(np.abs(exact).max()), change)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_oracle_is_llama(config: DecoderConfig) -> None:
    batch = plain_batch(config)
    exact, most = allowed(config, batch)
    theirs = llama_logits(config, parameters(describe(config.build())), batch["tokens"])
    assert np.abs(theirs - exact).max() <= most
    # The bound would not hide a small mistake: the rotation off by one position is far outside.
    shifted = {**batch, "positions": batch["positions"] * 2}
    definition = describe(config.build())
    off = reference.forward(definition, parameters(definition), shifted, method="predict").value
    assert np.abs(theirs - off).max() > 1000 * most


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_backends_are_llama(backend: str, config: DecoderConfig) -> None:
    batch = plain_batch(config)
    exact, most = allowed(config, batch)
    running = Running(backend, config.build())
    ours = running.backend.predict(running.state, batch)
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).max() <= most
    theirs = llama_logits(config, running.params, batch["tokens"])
    assert np.abs(ours - theirs).max() <= 2 * most
