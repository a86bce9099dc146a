"""The contract of `Ops` as a suite that any backend can be run against, with the oracle's answers as the measure.

In a lab's own tests::

    from portatrain.testing import CASES, check_case

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_operation(case):
        check_case(MyBackend, case)

or from a shell: ``python -m portatrain.testing BACKEND``. It needs of a backend class only `evaluate` and
`differentiate`. May import NumPy and portatrain's core; no framework.
"""

from portatrain.testing.case import Case as Case
from portatrain.testing.cases import CASES as CASES
from portatrain.testing.check import Check as Check
from portatrain.testing.check import ContractError as ContractError
from portatrain.testing.check import check_case as check_case
from portatrain.testing.check import check_ops as check_ops
from portatrain.testing.check import measure as measure
from portatrain.testing.tolerance import tolerance as tolerance
