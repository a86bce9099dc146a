"""The callback that saves runs before the schedule takes its step, so the file has the step before."""

from __future__ import annotations

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "PyTorch Lightning"
LINK = "https://github.com/Lightning-AI/pytorch-lightning/issues/1772"
WHAT = "the schedule is one step behind after a resume"
COST = "reported at least three times: #1464, #1772, #4655"
KINDS = {"schedule", "learning-rate"}
SAYS = "at step 2, it was at 3: off by -1"


def fault(wrong: bool) -> audit.Verdict:
    one, other = Torch(seed=0), Torch(seed=1)
    one.take(2)
    early = one.schedule.state_dict(), [g["lr"] for g in one.optimizer.param_groups]
    one.take(1)
    before = audit.record(**one.parts())
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    other.step = one.step
    schedule, rates = early if wrong else (one.schedule.state_dict(), [g["lr"] for g in one.optimizer.param_groups])
    other.schedule.load_state_dict(schedule)
    for group, rate in zip(other.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return audit.check(before, **other.parts())
