"""The optimizer's state dict is made once and kept: its tensors follow the run, its learning rate does not."""

from __future__ import annotations

import copy

from portatrain.testing import audit
from tests.support.audited import Torch

WHO = "torchtitan with TorchFT"
LINK = "https://github.com/pytorch/torchtitan/pull/4598"
WHAT = "a replica that joins goes on with an old learning rate"
COST = "replicas with equal gradients drifted apart; found while aligning two runs to zero deviation"
KINDS = {"learning-rate"}
SAYS = "the schedule says 0.00975528258, the optimizer uses 0.01"


def fault(wrong: bool) -> audit.Verdict:
    one, joiner = Torch(seed=0), Torch(seed=1)
    one.take(1)
    kept = one.optimizer.state_dict()  # its tensors are those of the optimizer, its numbers are copies
    kept["param_groups"] = copy.deepcopy(kept["param_groups"])
    for group in kept["param_groups"]:
        group["lr"] = 1e-2
    one.take(4)
    before = audit.record(**one.parts())
    sent = kept if wrong else one.optimizer.state_dict()
    joiner.model.load_state_dict(one.model.state_dict())
    joiner.schedule.load_state_dict(one.schedule.state_dict())
    joiner.optimizer.load_state_dict(sent)
    joiner.step = one.step
    return audit.check(before, **joiner.parts())
