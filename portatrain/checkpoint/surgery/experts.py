"""Upcycle dense feed-forward parts to experts: every expert is a copy of the dense part (Komatsuzaki et al. 2023,
Sparse Upcycling, arXiv:2212.05055), and the router begins as in a new run.

The weights of the chosen experts add up to 1 if the router normalises them, so the function stays. A shared part beside
the experts starts with an output of zero.

Slots: routed evenly, an expert sees its part of the tokens with its part of the weight, so its gradient is the dense
one divided by the number of experts X. A mean of the gradient is divided by X, a mean of its square by X^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from portatrain.checkpoint.surgery.edits import INITIAL, Edit, Surgery, contracted, named, tensors
from portatrain.errors import UserError
from portatrain.model.layers import MixtureMLP
from portatrain.model.module import Definition, TensorInfo


def experts(before: Definition, after: Definition) -> Surgery:
    """Return the surgery from dense feed-forward parts to mixtures (`layers.MixtureMLP`)."""
    edits: dict[str, Edit] = {}
    why = ""
    for path, mixture in _mixtures(before, after):
        router = mixture.router
        if not router.normalise or router.scale != 1.0:
            why = "the weights of a token's experts do not add up to 1 (the router does not normalise, or has a scale)"
        mine = {name: info for name, info in tensors(after).items() if name.startswith(f"{path}/")}
        for name, info in mine.items():
            dense = f"{path}/{name.removeprefix(f'{path}/experts/')}"
            if name.startswith(f"{path}/experts/"):
                edits[name] = _copies(name, dense, info, before)
            elif name.startswith(f"{path}/shared/") and any(contracted(info, at) for at in _hidden(info)):
                edits[name] = Edit(of=(INITIAL,), make=np.zeros_like)
            else:
                edits[name] = Edit(of=(INITIAL,), make=np.array)
    if not edits:
        raise UserError(
            "surgery experts",
            expected="a new model with a MixtureMLP where the old one has a feed-forward part (gate, up, down)",
            got=f"none; the old model has {named(n for n in before.params if n.endswith('/down'))}",
            do="Choose a model with experts, such as --set model=recipes.models.mixtral:MixtralConfig --set "
            "model.experts=8 --set model.chosen=2 --set model.expert_mlp=SIZE.",
        )
    return Surgery(edits=edits, changes=why)


def _mixtures(before: Definition, after: Definition) -> Iterator[tuple[str, MixtureMLP]]:
    for path, module in after.modules.items():
        if (
            isinstance(module, MixtureMLP)
            and f"{path}/experts/down" in after.params
            and f"{path}/down" in before.params
        ):
            yield path, module


def _hidden(info: TensorInfo) -> list[int]:
    return [at for at, axis in enumerate(info.axes) if axis == "mlp"]


def _copies(name: str, dense: str, info: TensorInfo, before: Definition) -> Edit:
    at, was = info.axes.index("experts"), before.params.get(dense)
    wanted = (*info.shape[:at], *info.shape[at + 1 :])
    if was is None or was.shape != wanted:
        raise UserError(
            f"surgery experts: {name}",
            expected=f"a dense {dense} of shape {list(wanted)}, of which every expert is a copy",
            got="none" if was is None else str(list(was.shape)),
            do="Give experts the hidden size of the dense part (model.expert_mlp = model.mlp): the function stays only "
            "if each expert is the whole of it, and has the same parts.",
        )
    return Edit(
        of=(dense,), make=partial(_repeated, at, info.shape[at]), slots=partial(_shared_out, at, info.shape[at])
    )


def _repeated(at: int, n: int, weight: np.ndarray) -> np.ndarray:
    return np.repeat(np.expand_dims(weight, at), n, at)


def _shared_out(at: int, n: int, slot: np.ndarray, degree: int) -> np.ndarray:
    return _repeated(at, n, slot) / n**degree
