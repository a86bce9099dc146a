"""Grow the width of the model (axis `embed`) to c times as many features: each is there c times, in every copy the same
(Chen et al. 2016, Net2Net, arXiv:1511.05641, section 2.2, where copies share what reads them).

A norm divides by the mean over all features, which stays if every feature is repeated equally often; that is why only
whole multiples keep the function, and eps stays as it is.

What                                       each copy is multiplied by f =
writes features: weights, biases, norms    1
reads features (sums over `embed`)         1 / c, and begins apart from the other copies, see below
the embedding table, scaled by s, then s'  s / s' (Gemma multiplies it by sqrt(embed); 1 in other models)
an output table of its own                 1 / c
the norm before a tied output table        1 / (c s / s'), since the table itself cannot also be divided

Copies that are alike in all would stay so. So what reads features has in each copy the initial values of a new run
added, less their mean over the copies: of equal features that adds zero.

Slots: moving all c copies by f moves the function as moving the old tensor by one does, so each copy has 1 / (c f) of
the gradient. A mean of the gradient is divided by c f, a mean of its square by (c f)^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from portatrain.checkpoint.surgery.edits import INITIAL, Edit, Surgery, contracted, grown, named
from portatrain.errors import UserError
from portatrain.model.module import Constant, Definition, TensorInfo

AXIS = "embed"


def embed(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with a whole multiple of its features."""
    found = grown("embed", (AXIS,), before, after)
    was = before.params | before.states
    sizes = {(was[info.name].shape[i], info.shape[i]) for info in found for i in [_axis(info)]}
    if len(sizes) > 1 or any(new % old for old, new in sizes):
        raise UserError(
            "surgery embed",
            expected="a whole multiple of the features, so that each is repeated equally often and norms stay",
            got=", ".join(f"{new} for {old}" for old, new in sorted(sizes)),
            do=f"Set embed to {2 * min(old for old, _ in sizes)}, or to another multiple of what it is.",
        )
    ((old, new),) = sizes
    c = new // old
    given = _tables(before, after, c)
    made: dict[str, Edit] = {}
    for info in found:
        reads = contracted(info, _axis(info))
        made[info.name] = _edit(info, c, *given.get(info.name, (1.0 / c if reads else 1.0, reads)))
    return Surgery(edits=made)


def _axis(info: TensorInfo) -> int:
    at = [i for i, axis in enumerate(info.axes) if axis == AXIS]
    if len(at) != 1:
        raise UserError(
            f"surgery embed: {info.name}",
            expected="one axis embed in a tensor",
            got=" ".join(info.axes),
            do="Write a surgery of your own: docs/run/surgery.md.",
        )
    return at[0]


def _tables(before: Definition, after: Definition, c: int) -> dict[str, tuple[float, bool]]:
    """Return (factor, whether it only reads features) of what no rule by axes decides: tables over a vocabulary, and a
    tied model's norm."""
    tables = [name for name, info in after.params.items() if {"vocab", AXIS} <= set(info.axes)]
    if not tables:
        return {}
    model: Any = after.model
    own = {part: after.owners.get(id(found)) for part, found in _parts(model).items()}
    entry, out, norm = own.get("in"), own.get("out"), own.get("norm")
    if entry is None or out is None or norm is None or {entry, out} != set(tables):
        raise UserError(
            "surgery embed",
            expected="a model that says which table embeds (embed.table), which gives logits (output_table), and the "
            "norm before it (final_norm.scale), as those of recipes.models.causal do",
            got=f"tables {named(tables)} in a {type(model).__name__}",
            do="Write a surgery of your own: docs/run/surgery.md.",
        )
    scales = [getattr(m, "embed_scale", None) or 1.0 for m in (before.model, model)]
    f = scales[0] / scales[1]
    if entry != out:
        return {entry: (f, False), out: (1.0 / c, True)}
    norms = [name for name in after.params if name.startswith(norm.rpartition("/")[0] + "/")]
    return {entry: (f, False), **dict.fromkeys(norms, (1.0 / (c * f), False))}


def _parts(model: Any) -> Mapping[str, Any]:
    table = getattr(getattr(model, "embed", None), "table", None)
    norm = getattr(getattr(model, "final_norm", None), "scale", None)
    return {"in": table, "out": getattr(model, "output_table", None), "norm": norm}


def _edit(info: TensorInfo, c: int, f: float, reads: bool) -> Edit:
    at = _axis(info)
    plus = 1.0 if info.name.endswith("/scale") and info.init == Constant(value=0.0) else 0.0  # 1 + scale
    return Edit(
        of=(INITIAL, info.name) if reads else (info.name,),
        make=partial(_read, at, c) if reads else partial(_repeated, at, c, f, plus),
        slots=partial(_slot, at, c, f),
    )


def _tiled(at: int, c: int, array: np.ndarray) -> np.ndarray:
    return np.concatenate([array] * c, at)


def _repeated(at: int, c: int, f: float, plus: float, array: np.ndarray) -> np.ndarray:
    return _tiled(at, c, array if f == 1.0 else (array + plus) * f - plus)


def _read(at: int, c: int, start: np.ndarray, array: np.ndarray) -> np.ndarray:
    apart = np.stack(np.split(start, c, at))
    return _tiled(at, c, array / c) + np.concatenate(list(apart - apart.mean(0)), at)


def _slot(at: int, c: int, f: float, slot: np.ndarray, degree: int) -> np.ndarray:
    return _tiled(at, c, slot / (c * f) ** degree)
