"""``python -m tests.support.court_counts``: try every kernel at hand, and every planted wrong one; print the counts.

docs/start/kernels.md shows what it prints. A kernel that runs on no CPU covers no case here. The exit code is 1 if an
honest kernel is convicted or a wrong one is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from portatrain.backends.kernels import TABLE, TRIED, Kernel, others
from portatrain.testing.kernels import Verdict, judge, sample, trials
from portatrain.testing.kernels.court import RUNNERS
from tests.support.planted_kernels import Planted


def honest() -> Iterator[tuple[str, Kernel]]:
    """Yield (backend, kernel) of every row at hand, ours and other packages'."""
    for kernel in (*others(), *TABLE):
        here = kernel.backends if kernel.operation in TRIED else ()
        yield from ((backend, kernel) for backend in here if backend in RUNNERS)


def wrong() -> list[Planted]:
    from tests.support import wrong_jax_kernels, wrong_kernels

    return [*wrong_kernels.PLANTED, *wrong_jax_kernels.PLANTED]


def tried(planted: Planted) -> Verdict:
    """Return the verdict on a planted kernel at the first case that convicts it; jax compiles a sample of them only."""
    cases = trials(planted.kernel.operation)
    return judge(
        planted.kernel, planted.backend, cases=sample(cases) if planted.backend == "jax" else cases, first=True
    )


def found(planted: Planted, verdict: Verdict) -> bool:
    """Return whether the verdict names the array that is wrong, and no array before it."""
    return verdict.convicted and verdict.wrong[0].operand == planted.operand and "raised" not in verdict.wrong[0].said


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for operation in TRIED:
        cases = trials(operation)
        print(f"{operation}: {len(cases)} cases, {sum(len(t.dtypes) for t in cases)} with their dtypes")
    print("\n| operation | backend | kernel | verdict | passed | refused | largest error, over its bound | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for backend, kernel in honest():
        v = judge(kernel, backend)
        good &= not v.convicted
        said = f"| {kernel.operation} | {backend} | `{kernel.name}` | {v.word} | {v.passed} | {len(v.refused)} |"
        largest = f"{v.largest:.2f}" if v.passed else "-"
        print(f"{said} {largest} | {v.seconds:.0f} |", flush=True)
    verdicts = [(planted, tried(planted)) for planted in wrong()]
    right = [found(planted, verdict) for planted, verdict in verdicts]
    for backend in RUNNERS:
        here = [ok for (planted, _), ok in zip(verdicts, right, strict=True) if planted.backend == backend]
        print(f"\n{len(here)} wrong kernels in {backend}: {sum(here)} convicted, each in the array that is wrong")
    return 0 if good and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
