"""The contract of `Ops`, as a suite that runs against any backend and compares it with the oracle.

In a lab's own tests::

    from portatrain.testing import CASES, check_case

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_operation(case):
        check_case(MyBackend, case)

or from a shell: ``python -m portatrain.testing BACKEND``. The backend class needs only `evaluate` and
`differentiate`. `portatrain.testing.audit` checks trainers that are not ours, and `portatrain.testing.pytest` is its
fixture; these two need nothing else of portatrain, so the names below are fetched when they are first used.
This room imports NumPy and portatrain's lower rooms, and no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portatrain.testing.case import Case as Case
    from portatrain.testing.cases import CASES as CASES
    from portatrain.testing.check import Check as Check
    from portatrain.testing.check import ContractError as ContractError
    from portatrain.testing.check import check_case as check_case
    from portatrain.testing.check import check_ops as check_ops
    from portatrain.testing.check import measure as measure
    from portatrain.testing.tolerance import tolerance as tolerance

_PUBLIC = {
    "Case": "case",
    "CASES": "cases",
    "Check": "check",
    "ContractError": "check",
    "check_case": "check",
    "check_ops": "check",
    "measure": "check",
    "tolerance": "tolerance",
}
"""Name -> the module of this package that defines it; `audit` is a package of its own."""


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    if name == "audit":
        return import_module("portatrain.testing.audit")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'portatrain.testing' has no attribute {name!r}")
    value = getattr(import_module(f"portatrain.testing.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
