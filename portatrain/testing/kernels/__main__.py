"""Try a kernel of the table, ours or another package's, on hard cases of its operation, beside float64.

Every case is run forward and backward. Each element of the result and of every gradient is compared with the exact
value; its bound follows from the dtype and the lengths of the sums, and is never measured. A kernel passes if it covers
at least one case and no element is beyond its bound. Cases that it refuses are listed with its reason and are not
counted as passed. A verdict of `convicted` names the case, the operand, the first wrong element, and its bound.

The exit code is 0 if every kernel of that name passes, 1 if one is convicted or covers no case, 2 if the command cannot
be carried out.

examples:
  python -m portatrain.testing.kernels --list
  python -m portatrain.testing.kernels sdpa-causal
  python -m portatrain.testing.kernels written-out --operation grouped_matmul --backend jax
  python -m portatrain.testing.kernels my-flash --device cuda --cases documents --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import NoReturn

from portatrain.backends.kernels import TABLE, TRIED, Kernel, others
from portatrain.errors import UserError, choice
from portatrain.system.exit_codes import FOUND, INTERRUPTED, OK
from portatrain.testing.kernels.court import RUNNERS, Verdict, judge, runner, sample, select, trials

PROGRAM = "python -m portatrain.testing.kernels"
PROGRESS_S = 2.0
SHOWN = 20
"""The number of wrong arrays that are printed; --json has all."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            PROGRAM, expected="its arguments", got=message, do=f"`{PROGRAM} --help` explains, with examples."
        )


def parser() -> argparse.ArgumentParser:
    about, _, examples = (__doc__ or "").partition("\nexamples:")
    made = _Parser(
        prog=PROGRAM,
        description=about.strip(),
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", nargs="?", help="the name of a kernel in the table")
    made.add_argument("--operation", choices=TRIED, help="its operation (default: every one with that name)")
    made.add_argument("--backend", choices=tuple(RUNNERS), help="its backend (default: every one that is installed)")
    made.add_argument("--device", default="cpu", help="the framework's name of the kind of device (default: cpu)")
    made.add_argument(
        "--cases", metavar="PATTERN", default="*", help="only cases with this in their name; * is any text"
    )
    made.add_argument("--quick", action="store_true", help="only a sample of the cases, for a first look")
    made.add_argument("--json", action="store_true", help="print one JSON object with all verdicts")
    made.add_argument("--list", action="store_true", help="list the kernels, or with --cases the cases, and stop")
    return made


def main(arguments: Sequence[str]) -> int:
    try:
        return run(parser().parse_args(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    if args.list:
        _list(args)
        return OK
    if args.name is None:
        raise UserError(PROGRAM, expected="the name of a kernel", got="none", do="--list lists them.")
    if args.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    verdicts = []
    named = _named(args)
    tried = {op: select(op, args.cases, empty=True) for op in {kernel.operation for _, kernel in named}}
    if not any(tried.values()):
        select(named[0][1].operation, args.cases)  # raises the error
    for backend, kernel in named:
        cases = sample(tried[kernel.operation]) if args.quick else tried[kernel.operation]
        if not cases:
            continue
        if args.device not in (kinds := runner(backend).devices()):
            raise choice(f"--device of {backend}", args.device, sorted(kinds))
        verdicts.append(judge(kernel, backend, device=args.device, cases=cases, progress=_Progress()))
        if not args.json:
            _print(verdicts[-1])
    if args.json:
        print(json.dumps({"verdicts": [as_json(v) for v in verdicts]}, indent=1))
    return OK if verdicts and all(v.word == "passed" for v in verdicts) else FOUND


def _rows(args: argparse.Namespace) -> Iterator[tuple[str, Kernel]]:
    """Yield (backend, kernel) of every row that the court has a place for."""
    for kernel in (*others(), *TABLE):
        wanted = kernel.operation in TRIED and kernel.operation == (args.operation or kernel.operation)
        for backend in kernel.backends if wanted else ():
            if backend in RUNNERS and backend == (args.backend or backend):
                yield backend, kernel


def _named(args: argparse.Namespace) -> list[tuple[str, Kernel]]:
    rows = list(_rows(args))
    found = [(backend, kernel) for backend, kernel in rows if kernel.name == args.name]
    if not found:
        raise choice("kernel", args.name, sorted({kernel.name for _, kernel in rows}))
    here = [(backend, kernel) for backend, kernel in found if find_spec(backend) is not None]
    missing = sorted({backend for backend, _ in found} - {backend for backend, _ in here})
    if not here:
        raise UserError(
            f"kernel {args.name}",
            expected=f"{' or '.join(missing)}, on which it runs",
            got="no such package",
            do=f"Install portatrain[{missing[0]}].",
        )
    for backend in missing:
        print(f"{args.name} on {backend} is not tried: {backend} is not installed", file=sys.stderr)
    return here


class _Progress:
    """Print the number of cases done, every PROGRESS_S seconds."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self.last >= PROGRESS_S:
            self.last = now
            print(f"  {done} of {of} cases after {now - self.start:.0f} s", file=sys.stderr, flush=True)


def _list(args: argparse.Namespace) -> None:
    if args.cases != "*":
        for operation in [args.operation] if args.operation else TRIED:
            for trial in select(operation, args.cases, empty=True):
                print(f"{operation:15} {' '.join(trial.dtypes):17} {trial.name}")
        return
    ours = set(map(id, TABLE))
    for backend, kernel in _rows(args):
        whose = "portatrain" if id(kernel) in ours else kernel.where.partition(".")[0]
        print(f"{kernel.operation:15} {backend:6} {kernel.name:15} {whose}")
    for operation in TRIED:
        found = trials(operation)
        print(f"{operation}: {len(found)} cases, {sum(len(t.dtypes) for t in found)} with their dtypes")


def as_json(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as JSON."""
    return {
        "operation": verdict.kernel.operation,
        "kernel": verdict.kernel.name,
        "backend": verdict.backend,
        "device": verdict.device,
        "verdict": verdict.word,
        "passed": verdict.passed,
        "convicted": len({(w.case, w.dtype) for w in verdict.wrong}),
        "compared": verdict.compared,
        "largest": verdict.largest if not verdict.wrong else None,
        "seconds": round(verdict.seconds, 3),
        "wrong": [_no_nan(asdict(w)) for w in verdict.wrong],
        "refused": [{"case": case, "dtype": dtype, "reason": reason} for case, dtype, reason in verdict.refused],
    }


def _no_nan(found: dict[str, object]) -> dict[str, object]:
    """Return the fields with numbers that JSON does not have as text."""
    return {k: str(x) if isinstance(x, float) and not abs(x) < float("inf") else x for k, x in found.items()}


def _print(verdict: Verdict) -> None:
    of = len({(w.case, w.dtype) for w in verdict.wrong}) + verdict.passed
    kernel = verdict.kernel
    print(f"{kernel.operation}={kernel.name} on {verdict.backend}, {verdict.device}: {verdict.word}")
    print(f"  {verdict.passed} of {of} cases passed, {len(verdict.refused)} refused; ", end="")
    print(f"{verdict.compared} elements compared in {verdict.seconds:.1f} s", end="")
    print("" if verdict.wrong or not of else f"; the largest error is {verdict.largest:.2f} of its bound")
    for wrong in verdict.wrong[:SHOWN]:
        print(f"  wrong: {wrong}")
    if len(verdict.wrong) > SHOWN:
        print(f"  and {len(verdict.wrong) - SHOWN} more arrays; --json has all")
    reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case, dtype, reason in verdict.refused:
        reasons[reason][case].append(dtype)
    for reason, cases in reasons.items():
        print(f"  refused, {reason}:")
        said = "; ".join(f"{case} ({' and '.join(dtypes)})" for case, dtypes in cases.items())
        print(textwrap.fill(said, 118, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
