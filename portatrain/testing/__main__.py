"""``python -m portatrain.testing BACKEND [--only WORDS]``: the contract, a line a comparison; exit code 1 if any
differs. With ``--only``, the cases that have these words in their name.
"""

from __future__ import annotations

import sys

from portatrain.backends.base import backend_class
from portatrain.errors import UserError
from portatrain.testing import CASES, measure


def main(arguments: list[str]) -> int:
    try:
        only = arguments[2] if len(arguments) == 3 and arguments[1] == "--only" else ""
        if len(arguments) != 1 and not only:
            raise UserError(
                "python -m portatrain.testing",
                expected="the name of one backend, and --only WORDS if wanted",
                got=" ".join(arguments) or "none",
                do="For example: python -m portatrain.testing jax --only attention",
            )
        cases = [case for case in CASES if only in case.name]
        if not cases:
            raise UserError(
                "python -m portatrain.testing --only",
                expected="a word in the name of a case",
                got=repr(only),
                do=f"The first words are: {', '.join(sorted({case.name.split()[0] for case in CASES}))}.",
            )
        backend = backend_class(arguments[0])
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    checks = [c for case in cases for precision in case.precisions for c in measure(backend, case, precision)]
    for check in checks:
        print(check)
    bad = sum(not check.good for check in checks)
    print(f"{len(checks)} comparisons of {len(cases)} cases, {bad} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
