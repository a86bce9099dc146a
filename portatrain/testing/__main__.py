"""``python -m portatrain.testing BACKEND``: the contract, a line a comparison; exit code 1 if any differs."""

from __future__ import annotations

import sys

from portatrain.backends.base import backend_class
from portatrain.errors import UserError
from portatrain.testing import CASES, measure


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise UserError(
                "python -m portatrain.testing",
                expected="the name of one backend",
                got=" ".join(arguments) or "none",
                do="For example: python -m portatrain.testing jax",
            )
        backend = backend_class(arguments[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    checks = [c for case in CASES for precision in case.precisions for c in measure(backend, case, precision)]
    for check in checks:
        print(check)
    bad = sum(not check.good for check in checks)
    print(f"{len(checks)} comparisons of {len(CASES)} cases, {bad} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
