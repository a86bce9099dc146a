"""Grow the width of feed-forward parts (axis `mlp`, of experts too) and the number of heads (`heads`, `kv_heads`).

New hidden features and heads have the initial values of a new run, and the weights that read them are zero: then they
add nothing, exactly. Query heads keep their key-value head: each key-value head gets the same number of new query
heads, after its own. Slots of new elements start at zero.

`embed` has a surgery of its own (`embed.py`). `head_dim` cannot grow: the rotary frequencies theta^(-2i / head_dim) and
the scale head_dim^-0.5 of scores follow from it, so no weights give the old scores at every distance.
"""

from __future__ import annotations

import numpy as np

from portatrain.checkpoint.surgery.edits import INITIAL, Edit, Surgery, along, contracted, grown
from portatrain.errors import UserError
from portatrain.model.layers import HeadsRMSNorm
from portatrain.model.module import Definition, TensorInfo

AXES = ("mlp", "heads", "kv_heads")


Heads = tuple[int, int]
"""The number of query heads, and of key-value heads."""


def width(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with wider feed-forward parts or more heads."""
    found = grown("width", AXES, before, after)
    heads = any("heads" in info.axes or "kv_heads" in info.axes for info in found)
    whole = heads and any(isinstance(module, HeadsRMSNorm) for module in after.modules.values())
    was = before.params | before.states
    both = (_heads(before), _heads(after)) if heads else None
    if both is not None:
        _check_groups(*both)
    return Surgery(
        edits={info.name: _edit(info, was[info.name], both) for info in found},
        changes="a norm over all heads together divides by the mean over more features" if whole else "",
    )


def _heads(model: Definition) -> Heads:
    found: dict[str, set[int]] = {"heads": set(), "kv_heads": set()}
    for info in model.params.values():
        for axis, size in zip(info.axes, info.shape, strict=True):
            if axis in found:
                found[axis].add(size)
    if any(len(sizes) > 1 for sizes in found.values()) or not found["heads"]:
        raise UserError(
            "surgery width: heads",
            expected="one number of heads, and one of key-value heads, in all layers",
            got=f"heads {sorted(found['heads'])}, kv_heads {sorted(found['kv_heads'])}",
            do="Write a surgery of your own: docs/run/surgery.md.",
        )
    (heads,) = found["heads"]
    return heads, next(iter(found["kv_heads"]), heads)


def _check_groups(was: Heads, now: Heads) -> None:
    group = was[0] // was[1]
    if now[0] // now[1] < group:
        raise UserError(
            "surgery width: heads",
            expected=f"at least {group} query heads for each of the {now[1]} key-value heads",
            got=f"heads={now[0]}, so {now[0] // now[1]}",
            do=f"Set heads={group * now[1]}, or more: a query head keeps its key-value head.",
        )


def _edit(info: TensorInfo, was: TensorInfo, both: tuple[Heads, Heads] | None) -> Edit:
    grows = [at for at, (n, m) in enumerate(zip(was.shape, info.shape, strict=True)) if n != m]
    if len(grows) > 1:
        raise UserError(
            f"surgery width: {info.name}",
            expected="one axis of a tensor that grows",
            got=", ".join(info.axes[at] for at in grows),
            do="Grow them in two forks, one after the other.",
        )
    (at,) = grows
    index = np.arange(was.shape[at])
    if info.axes[at] == "heads" and both is not None:
        (heads, kv), (more, more_kv) = both
        index = index // (heads // kv) * (more // more_kv) + index % (heads // kv)

    def put(into: np.ndarray, array: np.ndarray) -> np.ndarray:
        into[along(at, index)] = array
        return into

    zero = contracted(info, at)
    return Edit(
        of=(INITIAL, info.name),
        make=lambda start, array: put(np.zeros_like(start) if zero else start.copy(), array),
        slots=lambda slot, degree: put(np.zeros(info.shape, slot.dtype), slot),
    )
