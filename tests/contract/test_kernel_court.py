"""The court convicts every planted wrong kernel, in the array that is wrong, and no honest one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends import kernels
from portatrain.backends.kernels import Case, Kernel
from portatrain.backends.reference import ReferenceOps
from portatrain.errors import UserError
from portatrain.testing.kernels import judge, sample, select, trials
from portatrain.testing.kernels.__main__ import main
from portatrain.testing.kernels.bounds import DEVIATIONS, narrow, representable
from portatrain.testing.kernels.court import RUNNERS
from portatrain.testing.kernels.trial import Trial, operands, owed
from tests.support.planted_kernels import Planted

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from tests.support import court_counts, scaled_kernels, wrong_kernels  # noqa: E402

ROOT = Path(__file__).parents[2]
ROWS = [(b, k) for k in kernels.TABLE if k.operation in kernels.TRIED for b in k.backends if b in RUNNERS]
WRONG = court_counts.wrong()
QUICK = (
    "WindowOneTooLong",
    "NanInBlindRows",
    "KeysOfTheLastTileHaveNoGradient",
    "SegmentsInFloat32",
    "SmallValuesFlushed",
)


ACCELERATORS = ("flex",)
"""The kernels that run on no CPU, not even if they are named."""


def due_on_a_cpu(kernel: Kernel) -> str:
    return "covers no case" if kernel.name in ACCELERATORS else "passed"


def named(row: Any) -> str:
    return f"{row[0]}-{row[1].operation}-{row[1].name}"


# ---- the oracle


VALUES = [
    t if t in sample(trials("attention")) else pytest.param(t, marks=pytest.mark.full) for t in trials("attention")
]


@pytest.mark.parametrize("trial", VALUES, ids=lambda trial: trial.name)
def test_values_are_those_of_the_reference(trial: Trial) -> None:
    q, k, v, *more, _ = (x.astype(np.float64) for x in operands(trial, "float32").values())
    sinks = more[0] if more else None
    with np.errstate(all="ignore"):
        due = ReferenceOps.attention(None, q, k, v, sinks=sinks, **trial.indices, **trial.options)  # type: ignore
    result = owed(trial, "float32")[0]
    assert np.allclose(result.value, due, rtol=1e-12, atol=1e-13 * np.abs(v).max(initial=0.0))


SMOOTH = [
    *("heads 6:2, ratio 3", "soft-cap 0.5", "scale 0.3", "window 8, alibi, soft-cap 1", "prefix, documents"),
    *("positions of which many see nothing", "documents, ragged", "full, 17 queries, 129 keys", "values of 1e-30"),
    *("sinks", "sinks, documents", "sinks, rows that see nothing", "value heads of 24, sinks, window 8"),
    *("ragged", "rows past the sum", "sizes 127 x 129", "neighbours empty", "sixteen experts"),
]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_the_derivatives_of_the_values(name: str) -> None:
    (trial,) = (t for op in kernels.TRIED for t in trials(op) if t.name == name)
    given = {n: x.astype(np.float64) for n, x in operands(trial, "float32").items()}
    gradients = owed(trial, "float32")[1:]
    rng = np.random.default_rng(3)
    for (operand, x), due in zip(list(given.items())[:-1], gradients, strict=True):
        assert due.operand == f"gradient of {operand}"
        direction = rng.normal(size=x.shape) * np.abs(x).max()

        def along(step: float, operand: str = operand, x: Any = x, direction: Any = direction) -> float:
            moved = {**given, operand: x + step * direction}
            result = trial.oracle(moved, trial.indices, trial.options, "float32")[0].value
            return float((result * given["g"]).sum())

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        terms = float(np.linalg.norm(due.value * direction))
        assert (due.value * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-6 * terms)


def test_numbers_are_rounded_to_bfloat16_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=4096) * 10.0 ** rng.integers(-38, 38, 4096)).astype(np.float32)
    x[:5] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e-40, -0.0, 0.0]
    assert np.array_equal(representable(x, "bfloat16"), torch.tensor(x).bfloat16().float().numpy())
    assert np.array_equal(representable(x, "float32"), x)


def test_bounds_follow_from_dtype_and_length() -> None:
    """One product of two numbers: a rounding of the product, and one of the result."""
    trial = next(t for t in trials("grouped_matmul") if t.name == "sizes 1 x 1")
    for dtype in ("float32", "bfloat16"):
        (result, *_) = trial.oracle({k: np.abs(x) for k, x in operands(trial, dtype).items()}, trial.indices, {}, dtype)
        used = result.value[:6]
        assert result.bound[:6] == pytest.approx(DEVIATIONS * (narrow(dtype, 1) + narrow(dtype, 0)) * used, rel=1e-6)
    assert narrow("float32", 0) < 1e-6 < narrow("bfloat16", 0) < 2.0**-8


def test_every_case_has_a_name_of_its_own() -> None:
    for operation in kernels.TRIED:
        names = [t.name for t in trials(operation)]
        assert len(names) == len(set(names)) and sample(trials(operation))


# ---- the court


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] == "torch"], ids=named)
def test_a_sample_of_cases_convicts_no_honest_kernel(row: tuple[str, Kernel]) -> None:
    backend, kernel = row
    verdict = judge(kernel, backend, cases=sample(trials(kernel.operation)))
    assert verdict.word == due_on_a_cpu(kernel), verdict.wrong


@pytest.mark.parametrize("kernel", ["chunked", "ragged_dot"])
def test_a_sample_of_cases_convicts_no_honest_kernel_of_jax(kernel: str) -> None:
    row = next(k for k in kernels.TABLE if k.name == kernel)
    cases = [t for t in sample(trials(row.operation)) if "documents, " in t.name or t.shape == (24, 16, 16, 4)]
    verdict = judge(row, "jax", cases=[t for t in cases if "huge keys" not in t.name], dtypes=("float32",))
    assert verdict.word == "passed" and verdict.passed >= 3, verdict.wrong


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_no_honest_kernel_is_convicted(row: tuple[str, Kernel]) -> None:
    backend, kernel = row
    verdict = judge(kernel, backend)
    assert verdict.word == due_on_a_cpu(kernel), verdict.wrong
    assert verdict.largest < 1
    of = sum(len(t.dtypes) for t in trials(kernel.operation))
    assert verdict.passed + len(verdict.refused) == of
    if kernel.name == "written-out":
        assert verdict.passed == of


@pytest.mark.full
@pytest.mark.parametrize("kernel", wrong_kernels.HONEST, ids=lambda kernel: kernel.operation)
def test_the_kernels_that_are_changed_are_honest(kernel: Kernel) -> None:
    verdict = judge(kernel, "torch")
    assert verdict.word == "passed" and not verdict.refused, verdict.wrong[0]


def convict(planted: Planted) -> None:
    verdict = court_counts.tried(planted)
    assert verdict.convicted, f"{planted.kernel.name} passed {verdict.passed} cases"
    assert court_counts.found(planted, verdict), verdict.wrong


@pytest.mark.parametrize("planted", [p for p in WRONG if p.kernel.name in QUICK], ids=lambda p: p.kernel.name)
def test_a_wrong_kernel_is_convicted(planted: Planted) -> None:
    convict(planted)


@pytest.mark.full
@pytest.mark.parametrize("planted", [p for p in WRONG if p.kernel.name not in QUICK], ids=lambda p: p.kernel.name)
def test_every_wrong_kernel_is_convicted(planted: Planted) -> None:
    convict(planted)


@pytest.mark.full
@pytest.mark.parametrize("dtype", scaled_kernels.SEEN)
@pytest.mark.parametrize(
    ("operation", "array"), [(op, a) for op, arrays in scaled_kernels.ARRAYS.items() for a in arrays]
)
def test_a_small_error_in_any_array_is_convicted(operation: str, array: str, dtype: str) -> None:
    """Of float32 by 1 + 2^-17, of bfloat16, which has eight digits and three roundings on the way, by 1 + 2^-3."""
    verdict = scaled_kernels.scaled(operation, array, dtype)
    assert verdict.convicted and verdict.wrong[0].operand == (array if array == "result" else f"gradient of {array}")


def test_enough_is_planted() -> None:
    assert len(WRONG) >= 25 and len({p.kernel.name for p in WRONG}) == len(WRONG)
    assert {p.operand for p in WRONG} == {"result", *(f"gradient of {x}" for x in ("q", "k", "v", "sinks", "x", "w"))}


def test_the_verdict_names_the_first_wrong_element() -> None:
    (planted,) = (p for p in WRONG if p.kernel.name == "KeysOfTheLastTileHaveNoGradient")
    verdict = judge(planted.kernel, "torch", cases=select("attention", "129 tokens"), dtypes=("float32",))
    first = verdict.wrong[0]
    assert (first.case, first.operand, first.index, first.got) == ("129 tokens", "gradient of k", (0, 128, 0, 0), 0.0)
    assert abs(first.expected) > first.bound > 0 and first.count == 2 * 2 * 16
    assert re.search(r"129 tokens, float32: gradient of k\[0, 128, 0, 0\]: expected -?[\d.]+ \+- ", str(first))


def test_a_kernel_that_raises_is_convicted() -> None:
    kernel = Kernel(operation="attention", name="broken", backends=("torch",), where=f"{__name__}:broken")
    verdict = judge(kernel, "torch", cases=select("attention", "129 tokens"), first=True)
    assert verdict.convicted and "it raised ValueError: no such tile" in str(verdict.wrong[0])


def test_a_kernel_of_another_package_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "plugins" / "acme"))
    kernels.others.cache_clear()
    try:
        assert main(["acme-einsum", "--quick"]) == 0
        assert "attention=acme-einsum on torch, cpu: passed" in capsys.readouterr().out
    finally:
        kernels.others.cache_clear()


def broken(*_: Any, **__: Any) -> None:
    raise ValueError("no such tile")


def named_only(case: Case) -> str | None:
    """Cover a case only if the kernel was named, as an emulated one does on a CPU."""
    return None if dict(case.site.named).get("attention") == "emulated" else "it runs on a CPU only if it is named"


def test_a_kernel_that_runs_only_if_named_is_tried() -> None:
    kernel = Kernel(
        operation="attention",
        name="emulated",
        backends=("torch",),
        where="portatrain.backends.torch.attention:written_out",
        refuses=named_only,
    )
    assert judge(kernel, "torch", cases=select("attention", "129 tokens")).word == "passed"


def test_the_limits_are_small_only_while_the_court_sits() -> None:
    before = kernels.SCORES_BYTES
    judge(kernels.rows("attention", "torch")[-1], "torch", cases=())
    assert before == kernels.SCORES_BYTES


# ---- the command


def test_the_command_passes_convicts_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sdpa-causal", "--cases", "* tokens"]) == 0
    out = capsys.readouterr().out
    assert "attention=sdpa-causal on torch, cpu: passed" in out and "knows no" in out
    assert main(["sdpa-causal", "--cases", "alibi"]) == 1
    assert "covers no case" in capsys.readouterr().out
    assert main(["grouped_mm", "--cases", "sizes 64 x 128", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert (found["verdict"], found["passed"], found["refused"]) == ("passed", 2, [])
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"{k.operation} +{b} +{k.name} +portatrain", out) for b, k in ROWS)


def test_the_command_convicts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (planted,) = (p for p in WRONG if p.kernel.name == "StrictlyCausal")
    monkeypatch.setattr("portatrain.testing.kernels.__main__.others", lambda: (planted.kernel,))
    assert main(["StrictlyCausal", "--cases", "tokens"]) == 1
    out = capsys.readouterr().out
    assert ": convicted\n" in out and "wrong: 1 tokens, float32: result[0, 0, 0, 0]: expected" in out
    assert main(["StrictlyCausal", "--cases", "1 tokens", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert found["verdict"] == "convicted" and found["wrong"][0]["operand"] == "result"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--list lists them"),
        (["sdpa-casual"], "Did you mean sdpa-causal"),
        (["sdpa-causal", "--backend", "jax"], "kernel: expected one of"),
        (["sdpa-causal", "--device", "abacus"], "--device of torch"),
        (["sdpa-causal", "--cases", "no such case"], "--list --cases"),
        (["sdpa-causal", "--case", "x"], "--help"),
        (["sdpa-causal", "--operation", "norm"], "--help"),
    ],
)
def test_a_mistake_ends_in_one_paragraph(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == UserError.code
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out and captured.err.count("\n") == 1


def test_the_page_has_the_counts() -> None:
    page = (ROOT / "docs/start/kernels.md").read_text(encoding="utf-8")
    for operation in kernels.TRIED:
        cases = trials(operation)
        assert f"{operation}: {len(cases)} cases, {sum(len(t.dtypes) for t in cases)} with their dtypes" in page
    for backend in RUNNERS:
        count = sum(p.backend == backend for p in WRONG)
        assert f"{count} wrong kernels in {backend}: {count} convicted, each in the array that is wrong" in page
