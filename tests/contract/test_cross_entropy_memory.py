"""The logits never exist as a whole: not in the forward pass, not in the backward pass."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends.base import Context
from tests.support.running import BACKENDS

TOKENS, EMBED, VOCAB = 512, 8, 4096
CHUNK = 64 * VOCAB * 4
"""Bytes of 64 tokens' logits, an eighth of all."""


def arguments() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(2, TOKENS // 2, EMBED)), rng.normal(size=(VOCAB, EMBED))
    targets = rng.integers(0, VOCAB, (2, TOKENS // 2))
    return x.astype(np.float32), table.astype(np.float32), targets.astype(np.int32)


@pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed")
def test_jax_needs_no_room_for_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from portatrain.backends.jax import JaxBackend, losses

    def temporary_bytes(chunk: int) -> int:
        monkeypatch.setattr(losses, "CHUNK_BYTES", chunk)

        def loss(x: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
            return JaxBackend._standalone(Context()).cross_entropy(x, table, targets).sum

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = TOKENS * VOCAB * 4
    assert temporary_bytes(2 * logits) > logits  # the measure sees them where they are
    assert temporary_bytes(CHUNK) < logits / 2


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_torch_makes_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from portatrain.backends.torch import TorchBackend, losses

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    def largest(chunk: int) -> int:
        monkeypatch.setattr(losses, "CHUNK_BYTES", chunk)
        with Largest() as seen:
            TorchBackend.differentiate(lambda ops, x, t, y: ops.cross_entropy(x, t, y).sum, arguments(), Context())
        return seen.elements

    assert largest(8 * TOKENS * VOCAB) == TOKENS * VOCAB
    assert largest(CHUNK) == CHUNK // 4
