"""The operations that a model calls, at their kinks, ties, infinities and zeros, on a backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from portatrain.testing.recipe_check.report import Finding
from portatrain.testing.special_case import special_checks
from portatrain.testing.special_cases import SPECIALS


def special(backend: Any, name: str, used: Collection[str]) -> list[Finding]:
    """Return the operations among `used` of which a value or a derivative is not the oracle's."""
    bad: dict[str, list[str]] = {}
    for training in (False, True):
        cases = [case for case in SPECIALS if case.method in used and case.context.training == training]
        for check in special_checks(backend, cases) if cases else ():
            if not check.good:
                method, _, what = check.case.partition(", ")
                bad.setdefault(method, []).append(f"{what}, {check.what}")
    return [
        Finding(
            what=f"op {method}",
            said=f"expected the value and the derivative of every other backend, got others on {name}: {said[0]}"
            + (f" ({len(said) - 1} more)" if len(said) > 1 else ""),
            do=f"Correct what replaces ops.{method} on {name}, such as a kernel; its docstring states the derivative.",
        )
        for method, said in bad.items()
    ]
