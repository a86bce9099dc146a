"""Every kernel of attention does as the oracle does in every case that it covers, and refuses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends import choose_kernel, kernels
from portatrain.backends.base import Context, backend_class
from portatrain.errors import UserError
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing import check_case
from portatrain.testing.attention_cases import attention_cases
from portatrain.training.trainer import train
from tests.support.kernels import naming
from tests.support.running import BACKENDS

ON_ACCELERATORS = ("flex", "splash")
"""Kernels that refuse every one of these cases on a CPU; they have tests of their own."""
ROWS = [
    # test_ops.py runs these cases, too, and they are short enough for what is written out.
    pytest.param(name, row.name, marks=pytest.mark.full if row.name == "written-out" else ())
    for name in BACKENDS
    for row in kernels.rows("attention", name)
    if row.name not in ON_ACCELERATORS
]


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(("backend", "kernel"), ROWS)
def test_a_kernel_is_right_where_it_applies(backend: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCORES_BYTES", 1)  # else nothing is long enough to be cut into chunks
    ran, refused, named = 0, 0, naming(backend, kernel)
    for case in attention_cases():
        for precision in case.precisions:
            try:
                check_case(named, case, precision)
                ran += 1
            except UserError as error:
                assert f"attention={kernel}" in str(error)
                refused += 1
    assert ran and (refused or not kernel.startswith("sdpa"))
    if kernel == "written-out":
        assert not refused


def test_a_compiled_block_chooses_too() -> None:
    torch = pytest.importorskip("torch")
    from portatrain.backends.torch.attention import attention, load_kernels

    load_kernels()

    def run(q: Any, k: Any, **options: Any) -> Any:
        return attention(q, k, k, **options)

    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="eager")
    choose_kernel.taken()
    for options in ({}, {"window": 3}, {"softcap": 5.0}):
        torch.testing.assert_close(compiled(q, k, **options), run(q, k, **options))
    assert {c["kernel"] for c in choose_kernel.taken()} == {"sdpa-causal", "sdpa-masked", "written-out"}


def small() -> Any:
    sizes = ["model.layers=1", "model.embed=16", "model.heads=2", "model.kv_heads=1", "model.mlp=32", "data.seq_len=16"]
    return apply_overrides(
        load_recipe("tiny-lm"), [*sizes, "batch=4", "steps=2", "schedule.warmup=1", "eval_every=none", "hooks=()"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_choice_is_an_event_of_the_attempt(backend: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert train(small(), run, backend=backend, kernels=(("attention", "written-out"),)) == 0
    (event,) = run.events("kernels")
    assert event["choices"] and {c["kernel"] for c in event["choices"]} == {"written-out"}
    others = {k.name for k in kernels.rows("attention", backend)} - {"written-out"}
    assert all(c["named"] and set(c["against"]) == others for c in event["choices"])


def test_a_kernel_that_is_not_the_backends_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="kernel of attention"):
        train(small(), run, backend=BACKENDS[0], kernels=(("attention", "flash-5"),))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_of_any_size_and_queries_that_see_nothing(backend: str, precision: str) -> None:
    """All numbers are exact: scores of 8192, 0 and -8192 beside sinks that are equal, larger or smaller."""
    context = Context(precision=precision)
    q = np.zeros((1, 4, 4, 2), np.float32)
    q[..., 0] = np.array([128.0, 128.0, 0.0, -128.0], np.float32)  # of each head
    k = np.zeros((1, 4, 2, 2), np.float32)
    k[..., 0] = 64.0
    v = np.ones((1, 4, 2, 3), np.float32)
    sinks = np.array([8192.0, 0.0, 8192.0, 0.0], np.float32)
    of_q, of_k = np.array([[1, 2, 9, 1]], np.int32), np.array([[1, 2, 3, 4]], np.int32)  # segment 9 has no key

    def attend(ops: Any, q: Any, k: Any, v: Any, s: Any, of_q: Any, of_k: Any) -> Any:
        q, k, v, s = (ops.cast(x, "compute") for x in (q, k, v, s))
        out = ops.attention(q, k, v, sinks=s, segment_ids=(of_q, of_k), causal=False, scale=1.0)
        return ops.cast(out, "float32")

    given = (q, k, v, sinks, of_q, of_k)
    (out,) = backend_class(backend).evaluate(lambda ops, *a: (attend(ops, *a),), given, context)
    # A query of another segment sees one key: beside an equal sink its weight is a half, beside a larger one 0.
    np.testing.assert_array_equal(out[0, :, :, 0], [[0.5, 1, 0, 0], [0.5, 1, 0, 0], [0, 0, 0, 0], [0.5, 1, 0, 0]])
    _, gradients = backend_class(backend).differentiate(lambda ops, *a: attend(ops, *a).sum(), given, context)
    of_queries, of_keys, of_values, of_sinks = (np.asarray(g, np.float64) for g in gradients if g is not None)
    # d out / d sink = -weight of the key x weight of the sink, over 3 features of 3 queries that see something.
    np.testing.assert_array_equal(of_sinks, [-9 * 0.25, 0, 0, 0])
    np.testing.assert_array_equal(of_queries[0, :, 0, 0], np.array([1, 1, 0, 1]) * 3 * 0.25 * 64)
    np.testing.assert_array_equal(of_queries[0, 2], 0)
    assert np.isfinite(of_keys).all()
    np.testing.assert_array_equal(of_values[0, :, 0, 0], [0.5 + 1 + 0.5 + 1, 1.5, 0, 0])
