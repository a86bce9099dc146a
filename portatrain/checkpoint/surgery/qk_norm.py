"""Add RMSNorm to queries and keys. It changes the function: no scale can undo it.

A norm divides each query by its own length, which differs from token to token, and a scale is the same for all tokens.
So only a model whose queries all have one length would stay. The scale is set to the length that queries have on
average for inputs of a norm: with features of mean square g_e^2 (the norm's scale) that are independent, the mean
square of a feature of x W is the sum over e of g_e^2 W_e^2, here averaged over features and heads of a layer. Then the
scores keep their size, and what changes is measured.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from portatrain.checkpoint.surgery.edits import Edit, Surgery, named, tensors
from portatrain.errors import UserError
from portatrain.model.module import Constant, Definition, TensorInfo

WHY = (
    "RMSNorm divides every query and key by its own length, and no scale, which is the same for all tokens, undoes that"
)


def qk_norm(before: Definition, after: Definition) -> Surgery:
    """Return the surgery to a model with norms of queries and keys."""
    was, edits = tensors(before), {}
    new = {name: info for name, info in tensors(after).items() if name not in was}
    for name, info in new.items():
        head, _, part = name.rpartition("/")
        path, _, norm = head.rpartition("/")
        weight = f"{path}/w{norm[:1]}"
        if part != "scale" or norm not in ("q_norm", "k_norm") or weight not in before.params:
            raise _not_there(named(new))
        scale = f"{path}_norm/scale"  # of the norm before the attention, if there is one
        of = (weight, scale) if scale in before.params else (weight,)
        edits[name] = Edit(of=of, make=partial(_scale, info, before.params[weight]))
    if not edits:
        raise _not_there("none that is new")
    return Surgery(edits=edits, changes=WHY)


def _scale(info: TensorInfo, about: TensorInfo, weight: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
    """Return the root mean square of queries or keys in each layer, in the shape of the norm's scale."""
    lead = about.batch_dims
    squares = (
        weight**2 if norm is None else (weight * norm.reshape(*norm.shape, *(1,) * (weight.ndim - norm.ndim))) ** 2
    )
    over = tuple(range(lead, lead + about.fan_in_axes))
    mean = squares.sum(over).reshape(*about.shape[:lead], -1).mean(-1)
    size = np.sqrt(mean) - (1.0 if info.init == Constant(value=0.0) else 0.0)  # 1 + scale
    return np.broadcast_to(size.reshape(*size.shape, *(1,) * (len(info.shape) - lead)), info.shape).copy()


def _not_there(got: str) -> UserError:
    return UserError(
        "surgery qk-norm",
        expected="new tensors q_norm/scale and k_norm/scale beside the weights wq and wk of attention, and no others",
        got=got,
        do="Set the field of your model that adds them, such as --set model.qk_norm=true.",
    )
