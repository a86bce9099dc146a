"""Stochastic rounding: the same random words everywhere, no bias, nothing lost."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.model import dropout_hash, precision
from portatrain.model.module import TensorInfo, describe
from recipes.models.decoder import DecoderConfig

SEED = np.array(dropout_hash.words(2**40 + 7), np.int32)


def arange(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def words(
    offset: tuple[int, ...], shape: tuple[int, ...], *, count: int = 3, of: tuple[str, str] = ("opt/m", "w")
) -> Any:
    with np.errstate(over="ignore"):
        return precision.noise(SEED, np.int32(count), *of, offset, shape, arange)


def rounded(x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return precision.rounded_bits(x.astype(np.float32).view(np.int32), noise).astype(np.int32).view(np.float32)


def test_a_box_has_the_words_of_the_whole() -> None:
    whole = words((0, 0, 0), (4, 6, 10))
    assert whole.shape == (4, 6, 10) and whole.dtype == np.int32
    np.testing.assert_array_equal(words((1, 2, 5), (3, 4, 5)), whole[1:4, 2:6, 5:10])
    np.testing.assert_array_equal(words((2, 0, 0), (1, 6, 10)), whole[2:3])
    assert words((), ()).shape == ()


def test_words_differ_between_steps_tensors_roles_and_elements() -> None:
    base = words((0, 0), (64, 64)) & 0xFFFF
    for other in (
        words((0, 0), (64, 64), count=4),
        words((0, 0), (64, 64), of=("opt/v", "w")),
        words((0, 0), (64, 64), of=("opt/m", "w2")),
        words((64, 0), (64, 64)),
        words((0, 64), (64, 64)),
    ):
        same = (base == (other & 0xFFFF)).mean()
        assert same < 6 / 65536 + 3e-3
        assert abs(np.corrcoef(base.ravel(), (other & 0xFFFF).ravel())[0, 1]) < 5 / 64
    # Each of the 16 bits is a fair coin, within 5 standard deviations.
    for bit in range(16):
        assert abs(((base >> bit) & 1).mean() - 0.5) < 5 * 0.5 / 64


def test_it_rounds_to_a_neighbour_and_is_right_on_average() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=32) * 10.0 ** rng.integers(-30, 30, 32)).astype(np.float32)
    many = np.repeat(values[:, None], 1 << 14, axis=1)
    got = rounded(many, words((0, 0), many.shape)).astype(np.float64)
    low = (values.view(np.int32) & -0x10000).view(np.float32).astype(np.float64)  # towards zero
    high = ((values.view(np.int32) & -0x10000) + 0x10000).view(np.float32).astype(np.float64)
    assert ((got == low[:, None]) | (got == high[:, None])).all()
    assert (got == got.astype(ml_dtypes.bfloat16).astype(np.float64)).all()
    share = (values.astype(np.float64) - low) / (high - low)
    found = (got == high[:, None]).mean(axis=1)
    assert (abs(found - share) < 5 * np.sqrt(share * (1 - share) / many.shape[1]) + 1e-4).all()


def test_what_bfloat16_has_stays() -> None:
    x = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 2.0**-126, 3.3895314e38], np.float32)
    for count in range(20):
        np.testing.assert_array_equal(rounded(x, words((0,), (len(x),), count=count)), x)


@pytest.mark.skipif(bool(missing("jax") or missing("torch")), reason="needs both frameworks")
def test_frameworks_have_the_same_words_and_round_alike() -> None:
    import jax
    import jax.numpy as jnp
    import torch

    from portatrain.backends.jax.optimizer import kept

    info = TensorInfo(
        name="w",
        role="opt/m",
        shape=(3, 5, 7),
        axes=("a", "b", "c"),
        batch_dims=0,
        fan_in_axes=1,
        init=None,
        dtype="bfloat16",
    )  # type: ignore[arg-type]
    x = np.random.default_rng(1).normal(size=info.shape).astype(np.float32)
    want = rounded(x, words((0, 0, 0), info.shape))
    theirs = jax.jit(lambda v: kept(v, info, "opt/m", 2**40 + 7, jnp.int32(3)))(x)
    assert theirs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(theirs).astype(np.float32), want)
    there = precision.noise(
        torch.from_numpy(SEED),
        torch.tensor(3, dtype=torch.int32),
        "opt/m",
        "w",
        (1, 0, 2),
        (2, 5, 3),
        lambda n: torch.arange(n, dtype=torch.int32),
    )
    part = np.ascontiguousarray(x[1:, :, 2:5])
    got = precision.rounded_bits(torch.from_numpy(part).view(torch.int32), there).view(torch.float32)
    np.testing.assert_array_equal(got.numpy(), want[1:, :, 2:5])


def test_what_is_kept_in_which_dtype() -> None:
    model = DecoderConfig(vocab=32, embed=16, layers=2, heads=4, kv_heads=2, mlp=24).build()
    for name, dtype in (("fp32", "float32"), ("bf16", "float32"), ("bf16-state", "bfloat16")):
        found = precision.stored(describe(model), name)
        assert {t.dtype for t in found.params.values()} == {dtype}
        assert {precision.averaged(t).dtype for t in found.params.values()} == {"float32"}
