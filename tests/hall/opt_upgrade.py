"""A library is upgraded in the middle of a run. The state is the same; a function computes something a little else.

At OPT-175B one line of the library switched an executor of fused functions. Here a new version takes another GELU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from portatrain.testing import audit
from tests.support.audited import Torch, rows

WHO = "OPT-175B"
LINK = "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/chronicles/56_percent_update.md"
WHAT = "Megatron went from 2.4 to 2.6 by accident, and the activation norms took another trajectory"
COST = "seen on a plot; tracked down to one line of the library, the reason stayed unknown"
KINDS = {"loss", "gradients"}
SAYS = "gradients: gradient of 0.weight"


def gelu(version: str) -> Callable[[Any], Any]:
    return lambda x: functional.gelu(x, approximate="tanh" if version == "2.6" else "none")


def recorded(trainer: Torch, version: str) -> audit.Record:
    activation = gelu(version)
    trainer.model[1].forward = activation
    trainer.model[3].forward = activation
    trainer.model.zero_grad()
    loss = trainer.model(torch.from_numpy(rows(0))).square().mean()
    loss.backward()
    return audit.record(trainer.model, trainer.optimizer, batch=rows(0), loss=loss, gradients=True)


def fault(wrong: bool) -> audit.Verdict:
    trainer = Torch()
    before = recorded(trainer, "2.4")
    verdict = audit.compare(before, recorded(trainer, "2.6" if wrong else "2.4"))
    assert not verdict.kinds & {"changed", "data"}  # the audit tells a changed computation from a changed state
    return verdict
