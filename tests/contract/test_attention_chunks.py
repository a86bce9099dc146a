"""Scores of attention exist for one chunk of queries at a time, and that changes no value."""

from __future__ import annotations

import numpy as np
import pytest

from portatrain.backends import kernels
from portatrain.backends.base import Context
from portatrain.testing import Case, check_case
from portatrain.testing.attention_cases import attention_cases
from tests.support.running import BACKENDS

pytestmark = [
    pytest.mark.skipif("jax" not in BACKENDS, reason="jax is not installed"),
    pytest.mark.usefixtures("compiled_quickly"),
]

CASES = [
    pytest.param(case, precision, id=f"{case.name}-{precision}")
    for case in attention_cases()
    for precision in case.precisions
]


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_one_query_at_a_time(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from portatrain.backends.jax import JaxBackend

    monkeypatch.setattr(kernels, "SCORES_BYTES", 1)
    check_case(JaxBackend, case, precision)


def test_chunks_keep_within_the_bound() -> None:
    for rows, heads, length in ((1, 32, 8192), (4, 8, 8192), (1, 128, 131_072), (3, 5, 6000)):
        n = kernels.chunks(rows, heads, length, length)
        assert length % n == 0 and 4 * rows * heads * (length // n) * length <= kernels.SCORES_BYTES
    assert kernels.chunks(8, 4, 256, 256) == 1  # small models are not cut
    assert kernels.chunks(1, 4096, 7, 2**20) == 7  # one query at a time, where even that is too much


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_chunk_has_its_share_of_every_part(parts: int) -> None:
    import jax.numpy as jnp

    from portatrain.backends.jax.attention import Cut

    cut, x = Cut(3, parts), jnp.arange(2 * 24 * 5).reshape(2, 24, 5)
    chunked = cut.into(x, 1)
    assert chunked.shape == (3, 2, 8, 5)
    np.testing.assert_array_equal(cut.back(chunked, 1), x)
    owner = np.asarray(chunked[0, 0, :, 0]) // 5 // (24 // parts)
    assert [int((owner == part).sum()) for part in range(parts)] == [8 // parts] * parts


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax
    import jax.numpy as jnp

    from portatrain.backends.jax import JaxBackend

    length, heads, width = 512, 4, 16

    def temporary_bytes(most: int) -> int:
        monkeypatch.setattr(kernels, "SCORES_BYTES", most)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(JaxBackend._standalone(Context()).attention(q, k, v))

        x = np.zeros((1, length, heads, width), np.float32)
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * heads * length * length
    assert temporary_bytes(scores) > scores  # the measure sees them where they are
    assert temporary_bytes(scores // 16) < scores / 2
