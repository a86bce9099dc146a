"""Cases of `ops.experts`: two bodies, all kinds of load. X experts, C chosen ones a token, M the hidden size."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from portatrain.testing.case import FP32, Case, Rng, normal


def swiglu(ops: Any, x_NE: Any, gate_XEM: Any, up_XEM: Any, down_XME: Any) -> Any:
    """Return down(silu(gate x) up x), as Mixtral, Qwen and DeepSeek have it."""
    gate_NM = ops.silu(ops.grouped_matmul(x_NE, gate_XEM))
    return ops.grouped_matmul(gate_NM * ops.grouped_matmul(x_NE, up_XEM), down_XME)


def clamped(ops: Any, x_NE: Any, gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
    """Return the clamped experts with biases of gpt-oss (OpenAI 2025)."""
    gate_NM = ops.clip(ops.grouped_bias(ops.grouped_matmul(x_NE, gate), gate_bias), -1e4, 1.0)
    up_NM = ops.clip(ops.grouped_bias(ops.grouped_matmul(x_NE, up), up_bias), -1.0, 1.0)
    hidden_NM = (up_NM + 1.0) * (gate_NM * ops.sigmoid(1.702 * gate_NM))
    return ops.grouped_bias(ops.grouped_matmul(hidden_NM, down), down_bias)


def _distinct(rng: Rng, b: int, s: int, x: int, c: int) -> np.ndarray:
    return np.stack([rng.permutation(x)[:c] for _ in range(b * s)]).reshape(b, s, c).astype(np.int32)


@functools.cache  # the same objects, so that the oracle answers each once a process (`oracle.answers`)
def expert_cases() -> tuple[Case, ...]:
    b, s, e, m, x = 2, 5, 8, 12, 4
    weights = {"gate": (x, e, m), "up": (x, e, m), "down": (x, m, e)}
    biases = {"gate": (x, m), "up": (x, m), "down": (x, e)}
    loads = {
        "any load": lambda rng: _distinct(rng, b, s, x, 2),
        "experts without tokens": lambda rng: 1 + 2 * _distinct(rng, b, s, 2, 2),
        "all to one": lambda rng: np.full((b, s, 1), 2, np.int32),
    }

    def made(load: Any, shapes: Sequence[tuple[int, ...]]) -> Any:
        def args(rng: Rng) -> tuple[np.ndarray, ...]:
            experts = load(rng)
            return (*normal((b, s, e))(rng), *normal(experts.shape, *shapes, scale=0.5)(rng), experts)

        return args

    def run(body: Any) -> Any:
        return lambda ops, x, weights, *rest: ops.experts(body, x, rest[-1], weights, *rest[:-1])

    cases = [
        Case(name=f"experts, {what}", fn=run(swiglu), args=made(load, list(weights.values())), precisions=FP32)
        for what, load in loads.items()
    ]
    both = [shape for name in weights for shape in (weights[name], biases[name])]
    cases.append(Case(name="experts, clamped with biases", fn=run(clamped), args=made(loads["any load"], both)))
    odd = {"gate": (3, 5, 7), "up": (3, 5, 7), "down": (3, 7, 6)}
    cases.append(
        Case(
            name="experts of odd sizes, with another size out",
            fn=run(swiglu),
            precisions=FP32,
            args=lambda rng: (
                *normal((3, 4, 5))(rng),
                *normal((3, 4, 2), *odd.values(), scale=0.5)(rng),
                _distinct(rng, 3, 4, 3, 2),
            ),
        )
    )
    return tuple(cases)
