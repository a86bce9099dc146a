"""Judge a kernel: run every trial of its operation that it covers, and compare each element with what is due."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.backends import kernels
from portatrain.backends.kernels import Case, Kernel, Site
from portatrain.errors import UserError
from portatrain.testing.kernels.attention_data import of_documents, of_numbers
from portatrain.testing.kernels.attention_trials import of_masks, of_positions, of_sinks, of_sizes
from portatrain.testing.kernels.bounds import Due
from portatrain.testing.kernels.grouped_trials import grouped_trials
from portatrain.testing.kernels.trial import Trial, operands, owed

RUNNERS = {"jax": "portatrain.backends.jax.kernel_run", "torch": "portatrain.backends.torch.kernel_run"}
"""The backends that the court has a place for, and the module that runs a kernel on each."""
SMALL_SCORES_BYTES = 32 << 10
"""`kernels.SCORES_BYTES` while the court sits: its cases are as much smaller than those of models."""


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """The first wrong element in an array, or what else is wrong with it. operand: 'result', 'gradient of q' ..."""

    case: str
    dtype: str
    operand: str
    index: tuple[int, ...] = ()
    expected: float = 0.0
    got: float = 0.0
    bound: float = 0.0
    count: int = 0
    of: int = 0
    said: str = ""

    def __str__(self) -> str:
        where = f"{self.case}, {self.dtype}: {self.operand}"
        if self.said:
            return f"{where}: {self.said}"
        return (
            f"{where}{list(self.index)}: expected {self.expected:.9g} +- {self.bound:.2g}, got {self.got:.9g}; "
            f"{self.count} of {self.of} elements are wrong"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the court found. passed, wrong, refused: by case and dtype; wrong: all arrays of the first element that is
    wrong. largest: the largest error that was found, over its bound."""

    kernel: Kernel
    backend: str
    device: str
    passed: int
    compared: int
    largest: float
    wrong: tuple[Wrong, ...]
    refused: tuple[tuple[str, str, str], ...]
    seconds: float

    @property
    def convicted(self) -> bool:
        return bool(self.wrong)

    @property
    def word(self) -> str:
        if self.wrong:
            return "convicted"
        return "passed" if self.passed else "covers no case"


@functools.cache
def trials(operation: str) -> tuple[Trial, ...]:
    """Return the table of hard cases of an operation."""
    if operation == "grouped_matmul":
        return tuple(grouped_trials())
    return (*of_sizes(), *of_masks(), *of_positions(), *of_documents(), *of_numbers(), *of_sinks())


def select(operation: str, pattern: str = "*", *, empty: bool = False) -> tuple[Trial, ...]:
    """Return the trials with names that contain `pattern`, which may have the wildcards * and ?. Raises UserError if
    there are none, unless they may be `empty`."""
    found = tuple(t for t in trials(operation) if fnmatch.fnmatch(t.name, f"*{pattern}*"))
    if not found and not empty:
        raise UserError(
            "--cases",
            expected=f"words in the name of a case of {operation}",
            got=repr(pattern),
            do="For example: --cases documents. `--list --cases '?'` lists the names.",
        )
    return found


SAMPLE = (
    *("129 tokens", "heads 16:1, ratio 16", "window 64", "soft-cap 30", "a cache, each row elsewhere"),
    *("documents, ragged", "documents, one token each", "documents, padding alone"),
    *("positions of which many see nothing", "scores of 1e4, one key wins", "documents, huge keys hidden", "sinks"),
    *("ragged", "neighbours empty", "all to the last", "rows past the sum", "sizes 127 x 129"),
    *("huge rows past the sum", "denormals"),
)


def sample(cases: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return those of the cases that make a quick sample: few seconds, and few shapes to compile."""
    return tuple(case for case in cases if case.name in SAMPLE)


def runner(backend: str) -> Any:
    """Return the module that runs a kernel on `backend`; this imports its framework."""
    return importlib.import_module(RUNNERS[backend])


def judge(
    kernel: Kernel,
    backend: str,
    *,
    device: str = "cpu",
    cases: Iterable[Trial] | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    first: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Verdict:
    """Try `kernel` in the cases (all of its operation by default) in each of the `dtypes`; return the verdict.

    first: stop at the first case that convicts. progress: called with the number of cases done and of all.
    """
    run = runner(backend).run
    site = Site(backend=backend, device=device, named=((kernel.operation, kernel.name),))
    todo = [(t, d) for t in (trials(kernel.operation) if cases is None else cases) for d in t.dtypes if d in dtypes]
    wrong: list[Wrong] = []
    refused: list[tuple[str, str, str]] = []
    passed, compared, largest, start = 0, 0, 0.0, time.monotonic()
    with _small_limits():
        for i, (trial, dtype) in enumerate(todo):
            progress(i, len(todo))
            case = Case(site=site, dtype=dtype, shape=trial.shape, traits=trial.traits | _of_backend(trial, backend))
            if (reason := kernel.refuses(case)) is not None:
                refused.append((trial.name, dtype, reason))
                continue
            found, size, worst = _tried(run, kernel, trial, dtype, device)
            wrong += found
            passed += not found
            compared += size
            largest = max(largest, worst)
            if found and first:
                break
    return Verdict(
        kernel=kernel,
        backend=backend,
        device=device,
        passed=passed,
        compared=compared,
        largest=largest,
        wrong=tuple(wrong),
        refused=tuple(refused),
        seconds=time.monotonic() - start,
    )


def _of_backend(trial: Trial, backend: str) -> set[str]:
    """Return the traits that only this backend gives to the case (`kernels.Case`)."""
    cross = trial.operation == "attention" and trial.shape[1] != trial.shape[2]
    return {"cross"} if backend == "jax" and cross else set()


def _tried(run: Any, kernel: Kernel, trial: Trial, dtype: str, device: str) -> tuple[list[Wrong], int, float]:
    """Return what is wrong, the number of elements compared, and the largest error over its bound."""
    try:
        kind, found = run(
            kernel,
            operands(trial, dtype),
            trial.indices,
            trial.options,
            keywords=trial.keywords,
            dtype=dtype,
            device=device,
        )
    except Exception as error:  # whatever the kernel raises in a case that it says it covers
        said = f"it raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [Wrong(case=trial.name, dtype=dtype, operand="result", said=said)], 0, np.inf
    due = owed(trial, dtype)
    wrong = []
    if kind != dtype:
        wrong.append(Wrong(case=trial.name, dtype=dtype, operand="result", said=f"it is {kind}, where {dtype} is due"))
    wrong += [w for got, one in zip(found, due, strict=True) if (w := compared(trial.name, dtype, got, one))]
    sizes = sum(one.value.size for one in due)
    return wrong, sizes, max(_ratio(got, one) for got, one in zip(found, due, strict=True)) if not wrong else np.inf


def compared(case: str, dtype: str, got: np.ndarray, due: Due) -> Wrong | None:
    """Return the first element of `got` that is off by more than its bound, or None."""
    if got.shape != due.value.shape:
        said = f"its shape is {got.shape}, where {due.value.shape} is due"
        return Wrong(case=case, dtype=dtype, operand=due.operand, said=said)
    bad = ~(np.abs(got.astype(np.float64) - due.value) <= due.bound)  # also a NaN
    if not bad.any():
        return None
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return Wrong(
        case=case,
        dtype=dtype,
        operand=due.operand,
        index=tuple(map(int, first)),
        expected=float(due.value[first]),
        got=float(got[first]),
        bound=float(due.bound[first]),
        count=int(bad.sum()),
        of=bad.size,
    )


def _ratio(got: np.ndarray, due: Due) -> float:
    error = np.abs(got.astype(np.float64) - due.value)
    return float((error / np.maximum(due.bound, 5e-324)).max(initial=0.0))


@contextmanager
def _small_limits() -> Iterator[None]:
    kept = kernels.SCORES_BYTES
    kernels.SCORES_BYTES = SMALL_SCORES_BYTES
    try:
        yield
    finally:
        kernels.SCORES_BYTES = kept
