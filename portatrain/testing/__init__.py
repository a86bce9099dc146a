"""The contract of `Ops`, as a suite that runs against any backend and compares it with the oracle.

In a lab's own tests::

    from portatrain.testing import CASES, check_case

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_operation(case):
        check_case(MyBackend, case)

or from a shell: ``python -m portatrain.testing BACKEND``. The backend class needs only `evaluate` and
`differentiate`. This room imports NumPy and portatrain's lower rooms, and no framework.
"""

from portatrain.testing.case import Case as Case
from portatrain.testing.cases import CASES as CASES
from portatrain.testing.check import Check as Check
from portatrain.testing.check import ContractError as ContractError
from portatrain.testing.check import check_case as check_case
from portatrain.testing.check import check_ops as check_ops
from portatrain.testing.check import measure as measure
from portatrain.testing.tolerance import tolerance as tolerance
