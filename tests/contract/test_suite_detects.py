"""The suite is worth something: every mutant of the oracle is refused, and the oracle itself passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from portatrain.backends.reference import ReferenceBackend, ReferenceOps
from portatrain.model import dropout_hash
from portatrain.testing import CASES, ContractError, check_case, check_ops, measure


def _operations(name: str) -> list:
    return [case for case in CASES if case.name.startswith(name)]


class Interleaved(ReferenceOps):
    def rope(self, x_BSHD: Any, table: Any) -> Any:
        """Pairs of neighbours, as in GPT-J, in place of halves."""
        cos, sin = (t[..., None, :] for t in table)
        x1, x2 = x_BSHD[..., 0::2], x_BSHD[..., 1::2]
        return np.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x_BSHD.shape)


class WrongFrequencies(ReferenceOps):
    def rope_table(self, positions: Any, head_dim: int, *, theta: float = 10000.0, scaling: Any = None) -> Any:
        return super().rope_table(positions, head_dim, theta=theta * (1 + 1e-5), scaling=scaling)


class EpsOutside(ReferenceOps):
    def rms_norm(self, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
        y = x / (np.sqrt((x**2).mean(-1, keepdims=True)) + eps)
        return y if scale is None else y * scale


class ScaleOfOnePlus(ReferenceOps):
    def rms_norm(self, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
        return super().rms_norm(x, None if scale is None else 1 + scale, eps=eps)


class UnbiasedVariance(ReferenceOps):
    def layer_norm(self, x: Any, scale: Any = None, bias: Any = None, *, eps: float = 1e-6) -> Any:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=1) + eps)
        y = y if scale is None else y * scale
        return y if bias is None else y + bias


def _attention(**forced: Any) -> type[ReferenceOps]:
    class Mutant(ReferenceOps):
        def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
            for name, change in forced.items():
                options[name] = change(options.get(name))
            return super().attention(q_BSHD, k_BTKD, v_BTKD, **options)

    return Mutant


class SinksScaled(ReferenceOps):
    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        if options.get("sinks") is not None:
            options["sinks"] = options["sinks"] * q_BSHD.shape[3] ** -0.5
        return super().attention(q_BSHD, k_BTKD, v_BTKD, **options)


class InterleavedHeads(ReferenceOps):
    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        """Head h reads kv head h mod K."""
        groups = q_BSHD.shape[2] // k_BTKD.shape[2]
        return super().attention(
            q_BSHD, np.tile(k_BTKD, (1, 1, groups, 1)), np.tile(v_BTKD, (1, 1, groups, 1)), **options
        )


class PaddingSeesAll(ReferenceOps):
    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        """Queries of id 0 are not masked."""
        out = super().attention(q_BSHD, k_BTKD, v_BTKD, **options)
        ids = options.pop("segment_ids", None)
        if ids is None or isinstance(ids, tuple):
            return out
        free = super().attention(q_BSHD, k_BTKD, v_BTKD, **options)
        return np.where((ids == 0)[:, :, None, None], free, out)


class BlindMeans(ReferenceOps):
    def attention(self, q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, **options: Any) -> Any:
        """A query that sees nothing gets the mean of all values."""
        out = super().attention(q_BSHD, k_BTKD, v_BTKD, **options)
        blind = (out == 0).all(-1, keepdims=True)
        mean = v_BTKD.mean(1, keepdims=True).repeat(q_BSHD.shape[2] // k_BTKD.shape[2], 2)
        return np.where(blind, mean, out)


class KeepsOneMore(ReferenceOps):
    def dropout(self, x: Any, rate: float, *, site: int) -> Any:
        return super().dropout(x, rate + 2.0**-12 if rate else rate, site=site) * 1.0


class LowWordOnly(ReferenceOps):
    def __init__(self, *, sample: Any = None, **options: Any) -> None:
        super().__init__(sample=None if sample is None else sample & 0xFFFFFFFF, **options)


class SeedLowWordOnly(ReferenceOps):
    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(seed=dropout_hash.words(seed)[0], **options)


class NoRescale(ReferenceOps):
    def dropout(self, x: Any, rate: float, *, site: int) -> Any:
        return super().dropout(x, rate, site=site) * (1 - rate if self.training else 1)


class TanhGelu(ReferenceOps):
    def gelu(self, x: Any, *, approximate: bool = False) -> Any:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class TiesLast(ReferenceOps):
    def top_k(self, x: Any, k: int) -> Any:
        values, indices = super().top_k(x[..., ::-1], k)
        return values, (x.shape[-1] - 1 - indices).astype(np.int32)


class ZLossUnsquared(ReferenceOps):
    def cross_entropy(self, x: Any, table_VE: Any, targets: Any, *, z_loss: float = 0.0, **options: Any) -> Any:
        return super().cross_entropy(x, table_VE, targets, z_loss=z_loss * 0.999, **options)


class MaskNotInWeight(ReferenceOps):
    def cross_entropy(self, x: Any, table_VE: Any, targets: Any, *, mask: Any = None, **options: Any) -> Any:
        found = super().cross_entropy(x, table_VE, targets, mask=mask, **options)
        whole = super().cross_entropy(x, table_VE, targets, **options)
        return type(found)(found.sum, whole.weight_B, found.loss_B)


class WriteOneLater(ReferenceOps):
    def write(self, cache_BT: Any, value: Any, at: Any) -> Any:
        return super().write(cache_BT, value, min(int(at) + 1, cache_BT.shape[1] - value.shape[1]))


class MeanOfMeans(ReferenceOps):
    def mean(self, x: Any, axes: Any, *, over: Any) -> Any:
        return super().mean(x, axes, over=over) * (1 + 1e-5)


MUTANTS: dict[str, tuple[type[ReferenceOps], str]] = {
    "rotation of neighbours": (Interleaved, "rope positions"),
    "theta off by 1e-5": (WrongFrequencies, "rope"),
    "eps outside the root": (EpsOutside, "rms_norm"),
    "scale + 1": (ScaleOfOnePlus, "rms_norm"),
    "unbiased variance": (UnbiasedVariance, "layer_norm"),
    "causality dropped": (_attention(causal=lambda _: False), "attention"),
    "window one wider": (_attention(window=lambda w: w and w + 1), "attention"),
    "scale ignored": (_attention(scale=lambda _: None), "attention"),
    "softcap ignored": (_attention(softcap=lambda _: None), "attention"),
    "sinks ignored": (_attention(sinks=lambda _: None), "attention sinks"),
    "sinks of the next head": (_attention(sinks=lambda s: s if s is None else np.roll(s, 1)), "attention sinks"),
    "sinks scaled": (SinksScaled, "attention sinks"),
    "segments ignored": (_attention(segment_ids=lambda _: None), "attention"),
    "positions ignored": (_attention(positions=lambda _: None), "attention"),
    "heads interleaved": (InterleavedHeads, "attention heads"),
    "padding sees all": (PaddingSeesAll, "attention"),
    "blind queries get a mean": (BlindMeans, "attention"),
    "dropout threshold": (KeepsOneMore, "dropout"),
    "dropout not rescaled": (NoRescale, "dropout"),
    "sample's high word ignored": (LowWordOnly, "dropout"),
    "seed's high word ignored": (SeedLowWordOnly, "dropout"),
    "gelu by tanh": (TanhGelu, "gelu"),
    "ties in the other order": (TiesLast, "top_k"),
    "z-loss 0.1 % off": (ZLossUnsquared, "cross_entropy"),
    "mask not in the weight": (MaskNotInWeight, "cross_entropy"),
    "write one position later": (WriteOneLater, "write"),
    "mean 1e-5 off": (MeanOfMeans, "mean"),
}


@pytest.mark.parametrize(("operations", "prefix"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_refused(operations: type[ReferenceOps], prefix: str) -> None:
    class Mutant(ReferenceBackend):
        @classmethod
        def differentiate(cls, fn: Any, args: Any, context: Any) -> Any:
            return None, tuple(np.zeros(np.shape(a)) for a in args if np.asarray(a).dtype.kind == "f")

    Mutant.operations = operations
    cases = [case for case in _operations(prefix) if "gradient of" not in case.name]
    values = [check for case in cases for check in measure(Mutant, case) if "gradient" not in check.what]
    assert any(not check.good for check in values)


def _scaled(factor: float, which: int) -> type[ReferenceBackend]:
    """The oracle with one gradient off by a factor."""

    class Mutant(ReferenceBackend):
        @classmethod
        def differentiate(cls, fn: Any, args: Any, context: Any) -> Any:
            value, gradients = super().differentiate(fn, args, context)
            return value, tuple(g * factor if i == which else g for i, g in enumerate(gradients))

    return Mutant


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_off_by_a_factor_are_refused(which: int) -> None:
    case = next(case for case in CASES if case.name == "rms_norm eps=0.5")
    bad = [check for check in measure(_scaled(1 + 1e-5, which), case) if not check.good]
    if which == 2:  # an argument that the operation does not use: its gradient is zero
        assert not bad
    else:
        assert bad and all(f"gradient {which}" in check.what for check in bad)


@pytest.mark.parametrize(
    "name", ["einsum bse,ehd->bshd", "layer_norm", "cross_entropy z-loss, mask", "write at 2", "top_k"]
)
def test_the_oracle_passes(name: str) -> None:
    """Its element-wise gradients agree with its own slopes along directions."""
    case = next(case for case in CASES if case.name == name)
    if case.constant:  # differences know no stop: they move the weights, which backends hold fixed
        with pytest.raises(ContractError, match="gradient 3"):
            check_case(ReferenceBackend, case)
    else:
        check_case(ReferenceBackend, case)


def test_errors_name_the_case_and_the_numbers() -> None:
    class Mutant(ReferenceBackend):
        operations = TanhGelu

    case = next(case for case in CASES if case.name == "gelu")
    with pytest.raises(
        ContractError, match=r"Mutant: \d+ of \d+ comparisons differ\nDIFFERS +gelu: fp32 result: error .*, tolerance"
    ):
        check_ops(Mutant, [case])
