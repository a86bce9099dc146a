"""FlexAttention, the kernel of torch on GPUs for every mask that is not only causal.

There is no GPU here. On a CPU torch has a reference of the kernel's operator, which calls the functions of the mask and
of the scores for all pairs and has a backward pass; it does not read the block mask, so that is tested by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from portatrain.backends import kernels
from portatrain.backends.base import Context, backend_class
from portatrain.testing import check_case
from portatrain.testing.attention_cases import attention_cases
from portatrain.testing.kernels import judge

torch = pytest.importorskip("torch")

from portatrain.backends.torch import flex, visible  # noqa: E402

GPU = kernels.Site(backend="torch", device="cuda", named=(("attention", "flex"),))


def on_gpu(site: kernels.Site = GPU) -> Any:
    """The torch backend, whose operations on their own believe that they run on a GPU."""
    plain = backend_class("torch")

    class OnGpu(plain):  # type: ignore[valid-type,misc]
        @classmethod
        def _standalone(cls, context: Context) -> Any:
            ops = super()._standalone(context)
            return dataclasses.replace(ops, static=dataclasses.replace(ops.static, site=site))

    return OnGpu


@pytest.fixture
def any_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases have heads of 6, for which torch has no kernel on a GPU; the operator takes them."""
    rows = tuple(dataclasses.replace(r, refuses=lambda case: None) if r.name == "flex" else r for r in kernels.TABLE)
    monkeypatch.setattr(kernels, "TABLE", rows)


CASES = attention_cases()
ONE_OF_EACH = (
    "full, window=3",
    "window=2, softcap, scale, segments",
    "window=3, alibi, softcap, scattered segments",
    "positions that see nothing, window=2",
    "positions (B, S), alibi",
    "prefix, alibi, segments",
    "positions and pairs of segments",
    "full, softcap, pairs of segments, one of which sees nothing",
    "sinks, window=3, alibi, segments, wide values",
)


@pytest.mark.usefixtures("any_head_size")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_values_and_gradients_are_those_of_the_oracle(name: str) -> None:
    (case,) = (c for c in CASES if c.name == f"attention {name}")
    check_case(on_gpu(), case, "fp32")


@pytest.mark.full
@pytest.mark.usefixtures("any_head_size")
def test_every_case_is_that_of_the_oracle() -> None:
    for case in CASES:
        for precision in case.precisions:
            check_case(on_gpu(), case, precision)


OF_THE_REFERENCE = {
    "scores that rise by 30 a key": "it divides the log-sum-exp by log 2 and multiplies it again",
    "documents, huge keys hidden": "it multiplies infinite scores that are hidden by 0",
    "full, documents, huge keys hidden": "the same",
}
"""Cases in which torch's own reference of the operator errs, in its backward pass."""


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_court_acquits_the_functions_of_the_mask() -> None:
    """All hard cases of the court, as if the CPU were a GPU."""
    (row,) = (k for k in kernels.TABLE if k.name == "flex")

    def refuses(case: kernels.Case) -> str | None:
        reason = row.refuses(dataclasses.replace(case, site=GPU))
        return None if reason is not None and "heads of at least 16" in reason else reason

    verdict = judge(dataclasses.replace(row, refuses=refuses), "torch", device="cpu")
    wrong = {w.case for w in verdict.wrong}
    assert wrong == set(OF_THE_REFERENCE), [str(w) for w in verdict.wrong if w.case not in OF_THE_REFERENCE][:3]
    assert all(w.operand.startswith("gradient") for w in verdict.wrong)
    assert verdict.passed > 150


# ---- the block mask


def drawn(seed: int) -> dict[str, Any]:
    """Arguments of `visible`: ragged sizes, masks of all kinds, segments in order and scattered."""
    rng = np.random.default_rng(seed)
    b, s = int(rng.integers(1, 4)), int(rng.integers(1, 700))
    t = s if rng.random() < 0.5 else int(rng.integers(1, 700))
    given: dict[str, Any] = dict(s=s, t=t, device=torch.device("cpu"), causal=bool(rng.random() < 0.6))
    given["window"] = None if rng.random() < 0.5 else int(rng.choice([1, 2, 64, 127, 128, 129, 300, 2000]))

    def ids(rows: int, n: int) -> Any:
        found = rng.integers(0, int(rng.choice([1, 3, 40])), (rows, n))
        return torch.tensor(np.sort(found, -1) if rng.random() < 0.7 else found, dtype=torch.int32)

    given["segment_q"] = given["segment_k"] = None
    if rng.random() < 0.6:
        given["segment_q"], given["segment_k"] = ids(b, s), ids(b, t)
        if s == t and rng.random() < 0.7:
            given["segment_k"] = given["segment_q"]
    given["at_q"] = given["at_k"] = None
    if rng.random() < 0.5:
        at_q = torch.arange(s) + int(rng.integers(0, 700))
        given["at_q"], given["at_k"] = at_q, torch.arange(t)
        if rng.random() < 0.4:
            given["at_q"] = torch.tensor(rng.integers(0, 500, (b, s)))
            given["at_k"] = torch.tensor(rng.integers(0, 500, (int(rng.choice([1, b])), t)))
    given["prefix"] = None
    if rng.random() < 0.3:
        given["prefix"] = torch.tensor(rng.random((b, t)) < rng.choice([0.01, 0.99]))
    return given


def listed(number: Any, indices: Any) -> np.ndarray:
    """Dense (B, M, N) from a list of blocks."""
    count, order = number[:, 0].numpy(), indices[:, 0].numpy()
    found = np.zeros(order.shape, bool)
    for at in np.ndindex(count.shape):
        found[at][order[at][: count[at]]] = True
    return found


def tiles(mask: np.ndarray) -> np.ndarray:
    """(B, M, 128, N, 128), with no pairs beyond the end."""
    b, s, t = mask.shape
    n = flex.BLOCK
    mask = np.pad(mask, ((0, 0), (0, -s % n), (0, -t % n)))
    return mask.reshape(b, mask.shape[1] // n, n, mask.shape[2] // n, n)


@pytest.mark.parametrize("seed", range(60))
def test_the_block_mask_lists_every_block_with_a_pair(seed: int) -> None:
    given = drawn(seed)
    dense = visible.visible(**given)
    seen = flex.seen_by(*(v for k, v in given.items() if k not in ("s", "t", "device")))
    if dense is None:
        assert seen is None
        return
    rows = max(x.shape[0] for x in given.values() if getattr(x, "ndim", 0) == 2) if dense.shape[0] > 1 else 1
    b, i, j = torch.meshgrid(torch.arange(rows), torch.arange(given["s"]), torch.arange(given["t"]), indexing="ij")
    assert seen is not None
    assert torch.equal(seen(b, torch.zeros_like(b), i, j), dense.expand(rows, -1, -1))
    blocks = flex.block_mask(**given)
    part, whole, part_T, whole_T = (listed(*blocks[n : n + 2]) for n in (0, 2, 4, 6))
    assert np.array_equal(part_T, part.swapaxes(1, 2)) and np.array_equal(whole_T, whole.swapaxes(1, 2))
    cut = tiles(dense.numpy())
    assert not (part & whole).any()
    assert ((part | whole) >= cut.any((2, 4))).all()  # none left out
    assert (whole <= cut.all((2, 4))).all()  # whole blocks are whole
    in_order = given["prefix"] is None and all(
        x is None or bool((x.diff(dim=-1) >= 0).all())
        for x in (given[k] for k in ("segment_q", "segment_k", "at_q", "at_k"))
    )
    ranged = given["causal"] or given["window"] is not None
    one_rule = given["segment_q"] is None if ranged else given["segment_q"] is given["segment_k"]
    if in_order and one_rule:  # and no more than needed
        assert np.array_equal(part | whole, np.broadcast_to(cut.any((2, 4)), part.shape))
        assert np.array_equal(whole, np.broadcast_to(cut.all((2, 4)), whole.shape))
