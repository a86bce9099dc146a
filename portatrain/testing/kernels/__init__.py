"""The kernel court: hard cases of an operation, on which any kernel is tried against float64.

In a lab's own tests::

    from portatrain.testing.kernels import judge

    def test_my_kernel():
        verdict = judge(MY_KERNEL, "torch", device="cuda")
        assert verdict.word == "passed", verdict.wrong[0]

or from a shell: ``python -m portatrain.testing.kernels NAME``. `docs/start/kernels.md` explains both.
"""

from portatrain.testing.kernels.court import Verdict as Verdict
from portatrain.testing.kernels.court import Wrong as Wrong
from portatrain.testing.kernels.court import judge as judge
from portatrain.testing.kernels.court import sample as sample
from portatrain.testing.kernels.court import select as select
from portatrain.testing.kernels.court import trials as trials
from portatrain.testing.kernels.trial import Trial as Trial
