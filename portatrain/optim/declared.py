"""The slots that a rule declares for a tensor, checked: a rule of another package may return anything."""

from __future__ import annotations

from portatrain.errors import UserError
from portatrain.optim.base import Info, Rule, Slot

DTYPES = ("float32", "bfloat16", "float16", "int32")


def declared_slots(rule: Rule, info: Info) -> dict[str, Slot]:
    """Return the optimizer state that ``rule`` declares for a tensor, by slot name.

    Raises:
        UserError: the rule returns no dictionary of `Slot`, or a slot with axes that do not fit its shape.
    """
    mine = rule.rule_for(info)
    found = mine.slots(info)
    what = f"{type(mine).__name__}.slots({info.name})"
    if not isinstance(found, dict):
        raise _refusal(what, "a dictionary from slot names to Slot", f"a {type(found).__name__}")
    for name, slot in found.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise _refusal(what, "slot names that are texts without '/'", repr(name))
        if not isinstance(slot, Slot):
            raise _refusal(what, f"slot {name!r} to be a Slot", f"a {type(slot).__name__}")
        if len(slot.axes) != len(slot.shape):
            raise _refusal(
                what, f"slot {name!r} with one axis for each dimension", f"axes {slot.axes} for shape {slot.shape}"
            )
        if slot.dtype not in DTYPES:
            raise _refusal(what, f"slot {name!r} of dtype {', '.join(DTYPES)}", repr(slot.dtype))
    return found


def _refusal(what: str, expected: str, got: str) -> UserError:
    return UserError(
        what,
        expected=expected,
        got=got,
        do="Return, for example, {'m': Slot(axes=info.axes, shape=info.shape)}, and {} if nothing is kept.",
    )
