"""The continuity check for trainers that are not ours, in torch or jax: two calls.

    from portatrain import audit

    before = audit.record(model, optimizer, batch=batch, loss=loss, step=step, schedule=scheduler)
    before.save("before.json")  # small: sums of tensors, no tensor

    # later, after a restore, a conversion or an upgrade, in this process or in another one
    verdict = audit.check(audit.load("before.json"), model, optimizer, batch=batch, loss=loss, step=step)
    print(verdict)

A verdict names the tensor, the layer and the kind of fault. This package needs NumPy and the framework that the trainer
has imported; it imports nothing of portatrain but its error class.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portatrain.testing.audit.records import Record as Record
    from portatrain.testing.audit.records import load as load
    from portatrain.testing.audit.records import record as record
    from portatrain.testing.audit.verdicts import KINDS as KINDS
    from portatrain.testing.audit.verdicts import Fault as Fault
    from portatrain.testing.audit.verdicts import Verdict as Verdict
    from portatrain.testing.audit.verdicts import check as check
    from portatrain.testing.audit.verdicts import compare as compare
    from portatrain.testing.audit.verdicts import look as look

__all__ = ["record", "check", "load", "look", "compare", "Record", "Verdict", "Fault", "KINDS"]
_RECORDS = {"record", "load", "Record"}


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use (PEP 562), so that naming this package loads no NumPy."""
    if name not in __all__:
        raise AttributeError(f"module 'portatrain.testing.audit' has no attribute {name!r}")
    module = import_module(f"portatrain.testing.audit.{'records' if name in _RECORDS else 'verdicts'}")
    globals()[name] = getattr(module, name)
    return globals()[name]
